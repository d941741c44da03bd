//! Asking a hub: one question, its redirects, and their limits.

use std::io::ErrorKind;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use http::{HeaderMap, HeaderValue, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy};

use super::answer::{self, Fault, Head, Url};
use super::watched::Watched;
use crate::source::network::{Network, Route, address, presentable};

/// How many redirects are followed.
const REDIRECTS: usize = 5;

/// Why a question has no answer that can be used.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection failed; another try may succeed.
    Broken(String),
    /// The answer is a refusal, or not one that a hub gives: asking again is of no use.
    Refused(String),
    /// The hub asks to come back later.
    Later(Option<Duration>, String),
    /// The bytes asked for are not there.
    NoSuchRange,
}

/// An answer whose body is still to be read.
pub(super) struct Answer {
    pub head: Head,
    body: Body,
    agent: Agent,
}

impl Answer {
    /// The body; it is an error once nothing arrives for `window`.
    pub fn body(self, window: Duration) -> Watched {
        Watched::new(self.body.into_reader(), self.agent, window)
    }
}

/// Asks one endpoint.
pub(super) struct Client {
    endpoint: Url,
    authorization: Option<HeaderValue>,
    http: Option<Proxy>,
    https: Option<Proxy>,
    roots: RootCerts,
    network: Network,
    /// The agent of each route, made when it is first needed and after one was shut down.
    agents: Mutex<Vec<(Route, Agent)>>,
}

impl Client {
    /// A client for `endpoint`; `token` goes to it alone. Name and password in the endpoint's
    /// address take the token's place, as in the Python client.
    pub fn new(endpoint: &str, token: Option<&str>, network: &Network) -> Result<Self, Failure> {
        let refuse = |reason: &str| Failure::Refused(reason.to_owned());
        let url = Url::parse(endpoint).map_err(|fault| {
            refuse(match fault {
                Fault::Address => "HF_ENDPOINT is not an address such as https://huggingface.co",
                Fault::Scheme => "HF_ENDPOINT is neither an http nor an https address",
            })
        })?;
        let authorization = match basic(&url) {
            Some(basic) => Some(basic),
            None => token.map(|token| format!("Bearer {token}")),
        };
        let authorization = authorization
            .map(|text| {
                let mut value = HeaderValue::from_str(&text)
                    .map_err(|_| refuse("HF_TOKEN holds characters that a token cannot have"))?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()?;
        let through = |name: &str, proxy: &Option<String>| -> Result<Option<Proxy>, Failure> {
            let proxy = proxy.as_ref().map(|proxy| Proxy::new(proxy)).transpose();
            proxy.map_err(|_| refuse(&format!("{name} is not the address of a proxy")))
        };
        Ok(Self {
            endpoint: url.without_user(),
            authorization,
            http: through("HTTP_PROXY", &network.http_proxy)?,
            https: through("HTTPS_PROXY", &network.https_proxy)?,
            roots: roots(network)?,
            network: network.clone(),
            agents: Mutex::default(),
        })
    }

    fn agent(&self, route: Route) -> Agent {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, agent)) = agents.iter().find(|(known, _)| *known == route) {
            return agent.clone();
        }
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(match route {
                Route::Direct => None,
                Route::Http => self.http.clone(),
                Route::Https => self.https.clone(),
            })
            .user_agent(concat!("enamel/", env!("CARGO_PKG_VERSION")))
            .accept("*/*")
            .accept_encoding("identity")
            .timeout_per_read(Some(self.network.stall))
            .timeout_per_write(Some(self.network.stall))
            .tls_config(TlsConfig::builder().root_certs(self.roots.clone()).build())
            .build()
            .into();
        agents.push((route, agent.clone()));
        agent
    }

    /// Starts anew with other connections: those there may have been shut down.
    pub fn reconnect(&self) {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        agents.clear();
    }

    /// The address of something below the endpoint; `parts` are escaped.
    pub fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Url {
        self.endpoint.below(parts)
    }

    /// Asks for `url`, for the bytes from `from` on if given, and follows redirects. `heard` is
    /// told each hop's answer and whether it is the endpoint's own.
    pub fn get(
        &self,
        mut url: Url,
        from: Option<u64>,
        patience: Duration,
        heard: &mut dyn FnMut(&Head, bool) -> answer::Judged<()>,
    ) -> Result<Answer, Failure> {
        let deadline = Instant::now().checked_add(patience);
        for _ in 0..=REDIRECTS {
            let left = deadline.map_or(patience, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Failure::Broken(silence(patience)));
            }
            let of_endpoint = url.same_origin(&self.endpoint);
            let (head, body, agent) = self.ask(&url, from, left, patience)?;
            let judged = |reason: String| Failure::Refused(of_host(&url, &self.endpoint, reason));
            if !head.is_redirect() {
                self.status(&head, from.is_some()).map_err(|failure| {
                    failure.with(|reason| of_host(&url, &self.endpoint, reason))
                })?;
                heard(&head, of_endpoint).map_err(judged)?;
                return Ok(Answer { head, body, agent });
            }
            heard(&head, of_endpoint).map_err(judged)?;
            url = answer::redirect(&url, &head).map_err(judged)?;
        }
        Err(Failure::Refused(format!(
            "it redirects more than {REDIRECTS} times"
        )))
    }

    fn ask(
        &self,
        url: &Url,
        from: Option<u64>,
        left: Duration,
        patience: Duration,
    ) -> Result<(Head, Body, Agent), Failure> {
        let uri: Uri = url
            .to_string()
            .parse()
            .map_err(|_| Failure::Refused("it names an address that cannot be asked".into()))?;
        // Two readers of an address must agree on whom it names.
        if uri.host() != Some(url.host()) || uri.port_u16() != url.port() {
            return Err(Failure::Refused(
                "it names an address that cannot be asked".into(),
            ));
        }
        let route = self.network.route(url);
        let proxy = match route {
            Route::Http => self.network.http_proxy.as_deref(),
            Route::Https => self.network.https_proxy.as_deref(),
            Route::Direct => None,
        };
        let agent = self.agent(route);
        let mut request = agent.get(uri);
        if let Some(authorization) = &self.authorization
            && url.same_origin(&self.endpoint)
        {
            request = request.header("authorization", authorization);
        }
        if let Some(from) = from {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request
            .config()
            .timeout_resolve(Some(left))
            .timeout_connect(Some(left))
            .timeout_send_request(Some(left))
            .timeout_recv_response(Some(left))
            .build()
            .call()
            .map_err(|error| {
                let reason = explained(&error, patience);
                let reason = of_host(url, &self.endpoint, reason);
                Failure::Broken(match proxy {
                    Some(proxy) => format!("{reason}; asked through the proxy {}", address(proxy)),
                    None => reason,
                })
            })?;
        let (parts, body) = response.into_parts();
        let head = Head {
            status: parts.status.as_u16(),
            fields: fields(&parts.headers),
        };
        Ok((head, body, agent))
    }

    /// What a status that is no success means.
    fn status(&self, head: &Head, ranged: bool) -> Result<(), Failure> {
        let code = head.one("x-error-code").ok().flatten().unwrap_or_default();
        let refused = |text: &str| Err(Failure::Refused(text.to_owned()));
        match (head.status, code) {
            (200 | 206, _) => Ok(()),
            (416, _) if ranged => Err(Failure::NoSuchRange),
            (_, "GatedRepo") => refused(
                "access to it is restricted: accept the model's terms on its page, and set \
                 HF_TOKEN to a token that may read it",
            ),
            (_, "RepoNotFound") => refused(
                "the hub has no such repository; if it is private, set HF_TOKEN to a token that \
                 may read it",
            ),
            (_, "RevisionNotFound") => refused("the repository has no such revision"),
            (_, "EntryNotFound") => refused("the repository has no such file at this revision"),
            (401 | 403, _) => refused(
                "the hub denies access; accept the model's terms on its page if it has any, and \
                 set HF_TOKEN to a token that may read it",
            ),
            (404, _) => refused(
                "the hub has no such repository, revision or file (for a private one set HF_TOKEN)",
            ),
            (407, _) => refused("the proxy wants a name and a password (HTTPS_PROXY)"),
            (429, _) => Err(Failure::Later(
                head.retry_after().map(Duration::from_secs),
                "the hub limits the rate of requests; wait, or set HF_TOKEN".into(),
            )),
            (status @ 500..=599, _) => Err(Failure::Later(
                head.retry_after().map(Duration::from_secs),
                format!("the hub answers with HTTP status {status}; try again later"),
            )),
            (status, _) => refused(&format!(
                "the hub answers with HTTP status {status}, which is no answer to this question"
            )),
        }
    }
}

impl Failure {
    fn with(self, words: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Broken(reason) => Self::Broken(words(reason)),
            Self::Refused(reason) => Self::Refused(words(reason)),
            Self::Later(wait, reason) => Self::Later(wait, words(reason)),
            Self::NoSuchRange => Self::NoSuchRange,
        }
    }
}

/// Name and password of an address, as the header that carries them.
fn basic(url: &Url) -> Option<String> {
    let (name, word) = url.user()?;
    let plain = |text: &str| percent_encoding::percent_decode_str(text).collect::<Vec<u8>>();
    let mut pair = plain(name);
    pair.push(b':');
    pair.extend(plain(word));
    let engine = base64::engine::general_purpose::STANDARD;
    Some(format!("Basic {}", engine.encode(&pair)))
}

fn fields(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()))
        .collect()
}

/// Names the host where it is not the one that the user named.
fn of_host(url: &Url, endpoint: &Url, reason: String) -> String {
    if url.same_origin(endpoint) {
        return reason;
    }
    format!(
        "{reason} (at {}, where the hub redirects to)",
        address(&url.to_string())
    )
}

fn silence(patience: Duration) -> String {
    format!("no answer within {} seconds", patience.as_secs_f64().ceil())
}

/// Why there was no answer, with the way out where there is one.
pub(super) fn explained(error: &ureq::Error, patience: Duration) -> String {
    let text = error.to_string();
    if text.contains("UnknownIssuer") {
        return "its certificate is of an authority that is not known here; if your network has \
                one of its own, set SSL_CERT_FILE to a file with its certificate (PEM)"
            .into();
    }
    match error {
        ureq::Error::Timeout(_) => silence(patience),
        ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => {
            "it refuses the connection".into()
        }
        ureq::Error::Io(error) => presentable(&error.to_string()),
        ureq::Error::HostNotFound => "its name is not known".into(),
        ureq::Error::LargeResponseHeader(..) => "the headers of its answer have no end".into(),
        ureq::Error::Protocol(_) | ureq::Error::Http(_) => "its answer is not HTTP".into(),
        ureq::Error::ConnectProxyFailed(_) => "the proxy does not let it through".into(),
        _ => presentable(&text),
    }
}

/// The authorities that are believed: those of `SSL_CERT_FILE`, else the built-in ones.
fn roots(network: &Network) -> Result<RootCerts, Failure> {
    let Some(path) = &network.certificates else {
        return Ok(RootCerts::WebPki);
    };
    let refuse =
        |reason: String| Failure::Refused(format!("SSL_CERT_FILE ({}): {reason}", path.display()));
    let pem = std::fs::read(path).map_err(|e| refuse(e.to_string()))?;
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(refuse("it holds no certificate".into()));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}
