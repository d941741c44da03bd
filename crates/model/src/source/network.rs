//! How the network is used: proxies, certificates, patience, and what of an address may be shown.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::url::Url;

/// How the network is used. The environment's wishes are read by
/// [`PullOptions::from_env`](super::PullOptions::from_env).
#[derive(Clone)]
pub struct Network {
    /// How long the hub may take to answer the first question (`HF_HUB_ETAG_TIMEOUT`).
    pub answer: Duration,
    /// How long a download may stand still (`HF_HUB_DOWNLOAD_TIMEOUT`).
    pub stall: Duration,
    /// The proxy for http addresses (`HTTP_PROXY`, `ALL_PROXY`).
    pub http_proxy: Option<String>,
    /// The proxy for https addresses (`HTTPS_PROXY`, `ALL_PROXY`).
    pub https_proxy: Option<String>,
    /// Hosts asked without a proxy (`NO_PROXY`), separated by commas.
    pub no_proxy: String,
    /// Certificates of the authorities to believe in place of the built-in ones (`SSL_CERT_FILE`).
    pub certificates: Option<PathBuf>,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(8),
            stall: Duration::from_secs(60),
            http_proxy: None,
            https_proxy: None,
            no_proxy: String::new(),
            certificates: None,
        }
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network")
            .field("answer", &self.answer)
            .field("stall", &self.stall)
            .field("http_proxy", &self.http_proxy.as_deref().map(address))
            .field("https_proxy", &self.https_proxy.as_deref().map(address))
            .field("no_proxy", &self.no_proxy)
            .field("certificates", &self.certificates)
            .finish()
    }
}

/// Which way an address is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Direct,
    Http,
    Https,
}

impl Network {
    pub(super) fn route(&self, url: &Url) -> Route {
        let host = url.host();
        let (proxy, route) = match url.scheme() {
            "https" => (&self.https_proxy, Route::Https),
            _ => (&self.http_proxy, Route::Http),
        };
        if proxy.is_none() || self.bypasses(host) {
            return Route::Direct;
        }
        route
    }

    /// As the Python client reads `NO_PROXY`: a name stands for itself and its subdomains, with a
    /// dot before it for these alone, and a star for everything.
    fn bypasses(&self, host: &str) -> bool {
        let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
        self.no_proxy.split(',').any(|entry| {
            let entry = entry.trim().to_ascii_lowercase();
            let entry = entry.rsplit_once("://").map_or(&*entry, |(_, name)| name);
            if entry == "*" {
                return true;
            }
            let entry = entry.strip_prefix('*').unwrap_or(entry);
            let entry = entry.trim_matches(['[', ']']);
            let (name, below) = match entry.strip_prefix('.') {
                Some(name) => (name, false),
                None => (entry, true),
            };
            !name.is_empty()
                && (below && host == name
                    || host
                        .strip_suffix(name)
                        .is_some_and(|before| before.ends_with('.')))
        })
    }
}

/// An address as it may be shown: without name, password and query, which may be secrets.
pub(super) fn address(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, Some(path)),
        None => (rest, None),
    };
    let host = authority.rsplit('@').next().unwrap_or_default();
    let mut shown = String::new();
    if !scheme.is_empty() {
        shown.push_str(scheme);
        shown.push_str("://");
    }
    shown.push_str(host);
    // A path may hold a signed name; the host is what matters.
    if path.is_some_and(|path| !path.is_empty()) {
        shown.push_str("/…");
    }
    printable(&shown)
}

/// Words of a program or library as they may be shown: addresses in them without their secrets,
/// no control characters, not too long.
pub(super) fn presentable(text: &str) -> String {
    let words: Vec<String> = text
        .split_whitespace()
        .map(|word| match word.contains("://") {
            true => address(word),
            false => printable(word),
        })
        .collect();
    let text = words.join(" ");
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match super::hub::answer::is_unprintable(c) {
            true => '\u{fffd}',
            false => c,
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn network(no_proxy: &str) -> Network {
        Network {
            https_proxy: Some("http://user:word@proxy.example:3128".into()),
            no_proxy: no_proxy.into(),
            ..Network::default()
        }
    }

    #[test]
    fn no_proxy_names_hosts_as_the_python_client_does() {
        let cases = [
            ("", "huggingface.co", Route::Https),
            ("*", "huggingface.co", Route::Direct),
            ("huggingface.co", "huggingface.co", Route::Direct),
            ("huggingface.co", "cdn.huggingface.co", Route::Direct),
            ("ggingface.co", "huggingface.co", Route::Https),
            (".huggingface.co", "huggingface.co", Route::Https),
            (".huggingface.co", "cdn.huggingface.co", Route::Direct),
            (
                "a.example, HuggingFace.co ",
                "huggingface.co",
                Route::Direct,
            ),
            ("127.0.0.1", "127.0.0.1", Route::Direct),
            ("::1", "[::1]", Route::Direct),
        ];
        for (list, host, wanted) in cases {
            let url = Url::parse(&format!("https://{host}/x")).unwrap();
            assert_eq!(network(list).route(&url), wanted, "{list} {host}");
        }
        let plain = Url::parse("http://huggingface.co/").unwrap();
        assert_eq!(network("").route(&plain), Route::Direct);
    }

    #[test]
    fn what_is_shown_of_an_address_holds_no_secret() {
        assert_eq!(
            address("https://user:hunter2@mirror.example:8443/x/y?Signature=abc#d"),
            "https://mirror.example:8443/…"
        );
        assert_eq!(address("user:p@ss@proxy:3128"), "proxy:3128");
        assert_eq!(
            presentable("GET https://u:p@h/x?token=s failed\u{1b}[2J"),
            "GET https://h/… failed\u{fffd}[2J"
        );
        let shown = format!("{:?}", network(""));
        assert!(!shown.contains("word"), "{shown}");
    }
}
