//! Addresses of the web, read strictly: what two readers could take for two hosts is none.

use std::fmt;
use std::net::Ipv6Addr;

/// The longest host that is one.
const HOST_BYTES: usize = 253;

/// An http or https address, without its fragment.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    https: bool,
    /// Name and password, still escaped.
    user: Option<(String, String)>,
    host: String,
    port: Option<u16>,
    /// Begins with a slash.
    path: String,
    query: Option<String>,
}

/// Why a text is no [`Url`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is no address.
    Address,
    /// It is one of another kind than http and https.
    Scheme,
}

impl Url {
    /// Reads a whole address.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let (scheme, rest) = scheme(text).ok_or(Fault::Address)?;
        let https = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return Err(Fault::Scheme),
        };
        Self::after_scheme(https, rest.strip_prefix("//").ok_or(Fault::Address)?)
    }

    fn after_scheme(https: bool, text: &str) -> Result<Self, Fault> {
        let end = text.find(['/', '?', '#']).unwrap_or(text.len());
        let (authority, rest) = text.split_at_checked(end).ok_or(Fault::Address)?;
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => {
                let (name, word) = user.split_once(':').unwrap_or((user, ""));
                // An @ in the name is where readers differ about what the host is.
                if user.contains(['@', '\\']) || !user.bytes().all(|b| b.is_ascii_graphic()) {
                    return Err(Fault::Address);
                }
                (Some((name.to_owned(), word.to_owned())), place)
            }
            None => (None, authority),
        };
        let (host, port) = split_port(place).ok_or(Fault::Address)?;
        let port = match port {
            None | Some("") => None,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                Some(digits.parse().map_err(|_| Fault::Address)?)
            }
            Some(_) => return Err(Fault::Address),
        };
        let (path, query) = path_and_query(rest)?;
        Ok(Self {
            https,
            user,
            host: host_name(host).ok_or(Fault::Address)?,
            port,
            path: match path.is_empty() {
                true => "/".into(),
                false => without_dots(&path),
            },
            query,
        })
    }

    /// The address that `reference` is, as a redirect of this one (RFC 3986, 5.2).
    pub fn join(&self, reference: &str) -> Result<Self, Fault> {
        if scheme(reference).is_some() {
            return Self::parse(reference);
        }
        if let Some(rest) = reference.strip_prefix("//") {
            return Self::after_scheme(self.https, rest);
        }
        let (path, query) = path_and_query(reference)?;
        let mut to = self.clone();
        if path.is_empty() {
            if query.is_some() {
                to.query = query;
            }
            return Ok(to);
        }
        to.path = match path.starts_with('/') {
            true => without_dots(&path),
            false => {
                let folder = self.path.rsplit_once('/').map_or("", |(folder, _)| folder);
                without_dots(&format!("{folder}/{path}"))
            }
        };
        to.query = query;
        Ok(to)
    }

    /// The address of something below this one; `parts` are escaped. No query is kept.
    pub fn below<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut to = self.clone();
        to.query = None;
        while to.path.ends_with('/') {
            to.path.pop();
        }
        for part in parts {
            to.path.push('/');
            for byte in part.bytes() {
                match byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                    true => to.path.push(char::from(byte)),
                    false => to.path.push_str(&format!("%{byte:02X}")),
                }
            }
        }
        to
    }

    /// The same with this query, which must need no escapes.
    pub fn with_query(mut self, query: &str) -> Self {
        self.query = Some(query.to_owned());
        self
    }

    /// The same without name and password.
    pub fn without_user(mut self) -> Self {
        self.user = None;
        self
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        match self.https {
            true => "https",
            false => "http",
        }
    }

    /// The host in lower case, an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, where one is named.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// Name and password, still escaped.
    pub fn user(&self) -> Option<(&str, &str)> {
        let (name, word) = self.user.as_ref()?;
        Some((name, word))
    }

    /// Whether both are of one server: the same scheme, host and port.
    pub fn same_origin(&self, other: &Self) -> bool {
        let port = |url: &Self| url.port.unwrap_or(if url.https { 443 } else { 80 });
        self.https == other.https && self.host == other.host && port(self) == port(other)
    }
}

/// What is sent: without name and password.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.host)?;
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        f.write_str(&self.path)?;
        match &self.query {
            Some(query) => write!(f, "?{query}"),
            None => Ok(()),
        }
    }
}

/// A query may be a secret, so a debug print has none.
impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::network::address(&self.to_string()))
    }
}

/// The scheme and what follows its colon, where a text has one.
fn scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let named = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    named.then_some((scheme, rest))
}

fn split_port(place: &str) -> Option<(&str, Option<&str>)> {
    if place.starts_with('[') {
        let (inner, rest) = place.split_once(']')?;
        let host = place.get(..inner.len().checked_add(1)?)?;
        return match rest {
            "" => Some((host, None)),
            _ => Some((host, Some(rest.strip_prefix(':')?))),
        };
    }
    Some(match place.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (place, None),
    })
}

/// A name of letters, digits, `-`, `_` and dots, or an IPv6 address in brackets.
fn host_name(host: &str) -> Option<String> {
    if let Some(inner) = host.strip_prefix('[') {
        let address: Ipv6Addr = inner.strip_suffix(']')?.parse().ok()?;
        return Some(format!("[{address}]"));
    }
    let sound = !host.is_empty()
        && host.len() <= HOST_BYTES
        && host.split('.').next().is_some_and(|part| !part.is_empty())
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    sound.then(|| host.to_ascii_lowercase())
}

/// Path and query without fragment, characters escaped that must be.
fn path_and_query(text: &str) -> Result<(String, Option<String>), Fault> {
    let text = text.split('#').next().unwrap_or(text);
    let (path, query) = match text.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (text, None),
    };
    // A backslash is a slash to some readers.
    if path.contains('\\') || text.contains(|c: char| c.is_control()) {
        return Err(Fault::Address);
    }
    Ok((escaped(path), query.map(escaped)))
}

/// What an address cannot hold, escaped; what is escaped already stays.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte) {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// A path from the root without `.` and `..` in it.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut parts = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        match part {
            "." => {}
            ".." => {
                kept.pop();
            }
            _ => {
                kept.push(part);
                continue;
            }
        }
        if last {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The examples of RFC 3986, 5.4, but for those of other schemes.
    #[test]
    fn references_are_resolved_as_the_standard_has_it() {
        let base = Url::parse("http://a/b/c/d;p?q").unwrap();
        let cases = [
            ("g", "http://a/b/c/g"),
            ("./g", "http://a/b/c/g"),
            ("g/", "http://a/b/c/g/"),
            ("/g", "http://a/g"),
            ("//g", "http://g/"),
            ("?y", "http://a/b/c/d;p?y"),
            ("g?y", "http://a/b/c/g?y"),
            ("#s", "http://a/b/c/d;p?q"),
            ("g#s", "http://a/b/c/g"),
            ("g?y#s", "http://a/b/c/g?y"),
            (";x", "http://a/b/c/;x"),
            ("", "http://a/b/c/d;p?q"),
            (".", "http://a/b/c/"),
            ("./", "http://a/b/c/"),
            ("..", "http://a/b/"),
            ("../g", "http://a/b/g"),
            ("../..", "http://a/"),
            ("../../g", "http://a/g"),
            ("../../../g", "http://a/g"),
            ("/./g", "http://a/g"),
            ("/../g", "http://a/g"),
            ("g.", "http://a/b/c/g."),
            ("..g", "http://a/b/c/..g"),
            ("./../g", "http://a/b/g"),
            ("./g/.", "http://a/b/c/g/"),
            ("g;x=1/../y", "http://a/b/c/y"),
            ("g?y/../x", "http://a/b/c/g?y/../x"),
        ];
        for (reference, wanted) in cases {
            let found = base.join(reference).unwrap().to_string();
            assert_eq!(found, wanted, "{reference}");
        }
    }

    #[test]
    fn what_readers_could_differ_about_is_no_address() {
        let cases = [
            "",
            "x",
            "http:",
            "http://",
            "http:/a",
            "http:///a",
            "http://@/",
            "http://a@b@c/",
            "http://good\\@evil/",
            "http://evil\\.good/",
            "http://a/b\\c",
            "http://a b/",
            "http://a%2eb/",
            "http://a:b/",
            "http://a:70000/",
            "http://a:1:2/",
            "http://[::1/",
            "http://[::1]x/",
            "http://[nothing]/",
            "http://ä.example/",
            "http://.example/",
            "http://a/\r\nHost: b",
        ];
        for text in cases {
            assert_eq!(Url::parse(text), Err(Fault::Address), "{text:?}");
        }
        for text in [
            "file:///etc/passwd",
            "ftp://a/",
            "data:,x",
            "javascript://a",
        ] {
            assert_eq!(Url::parse(text), Err(Fault::Scheme), "{text}");
        }
    }

    #[test]
    fn an_address_comes_back_as_it_is_sent() {
        let cases = [
            ("HTTPS://Hub.Example", "https://hub.example/"),
            ("http://[0:0::1]:8080/x", "http://[::1]:8080/x"),
            ("http://u:p@a:80/", "http://a:80/"),
            ("http://a?x=1", "http://a/?x=1"),
            (
                "http://a/x y/\"{é}\"?<z>",
                "http://a/x%20y/%22%7B%C3%A9%7D%22?%3Cz%3E",
            ),
            ("http://a/%41%2f", "http://a/%41%2f"),
        ];
        for (text, wanted) in cases {
            let url = Url::parse(text).unwrap();
            assert_eq!(url.to_string(), wanted);
            let other: http::Uri = wanted.parse().unwrap();
            assert_eq!(other.host(), Some(url.host()));
            assert_eq!(other.port_u16(), url.port());
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| {
            let (a, b) = (Url::parse(a).unwrap(), Url::parse(b).unwrap());
            a.same_origin(&b)
        };
        assert!(same("https://a/x", "https://A:443/y?z"));
        for other in [
            "http://a/",
            "https://a:444/",
            "https://a./",
            "https://b.a/",
            "https://b/",
        ] {
            assert!(!same("https://a/", other), "{other}");
        }
    }

    #[test]
    fn names_are_escaped_and_secrets_not_printed() {
        let url = Url::parse("https://me:secret@hub.example/base/?k=secret").unwrap();
        let below = url.below(["a b", "ä", "..%2f", "x?y#z"]);
        assert_eq!(
            below.to_string(),
            "https://hub.example/base/a%20b/%C3%A4/..%252f/x%3Fy%23z"
        );
        assert!(!format!("{url:?} {url}").contains("me:secret"));
        assert!(!format!("{url:?}").contains("secret"));
    }
}
