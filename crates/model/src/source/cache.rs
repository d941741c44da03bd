//! The cache directory, the settings of a pull, and the lock that pulls of one model share.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::home::expand_variable;
use super::network::{Network, address};
use super::{PullProgress, SourceError};

/// The hub that is asked when `HF_ENDPOINT` names no other.
const PUBLIC_HUB: &str = "https://huggingface.co";

/// Where models are kept and how the network may be used. [`PullOptions::from_env`] reads the
/// environment once, so that all code below it depends on this value alone.
#[derive(Clone)]
pub struct PullOptions {
    /// The cache: `ENAMEL_HOME`, else `enamel` in the XDG cache directory.
    pub root: PathBuf,
    /// Where hub repositories are kept, in the hub clients' common layout: `HF_HUB_CACHE`,
    /// `HUGGINGFACE_HUB_CACHE`, or `HF_HOME/hub`, whichever is set first in this order (so that
    /// Python sees the same files), else `hub` in the cache.
    pub hub_cache: PathBuf,
    /// A further directory in that layout that is only read: the hub clients' default.
    pub hub_fallback: Option<PathBuf>,
    /// The hub's address (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The hub's access token: `HF_TOKEN`, else the one that `hf auth login` stored in
    /// `HF_TOKEN_PATH`.
    pub token: Option<String>,
    /// Whether the hub must not be asked (`HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`).
    pub hub_offline: bool,
    /// Whether nothing at all may be fetched.
    pub offline: bool,
    /// Proxies, certificates and patience.
    pub network: Network,
}

impl fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullOptions")
            .field("root", &self.root)
            .field("hub_cache", &self.hub_cache)
            .field("hub_fallback", &self.hub_fallback)
            .field("endpoint", &address(&self.endpoint))
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("hub_offline", &self.hub_offline)
            .field("offline", &self.offline)
            .field("network", &self.network)
            .finish()
    }
}

/// The cache directory: `ENAMEL_HOME`, else `enamel` in the XDG cache directory.
pub fn cache_root() -> Result<PathBuf, SourceError> {
    Environment(&|name| std::env::var_os(name)).root()
}

/// The variables of a process.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Environment<'_> {
    /// A variable that is set to something.
    fn set(&self, name: &str) -> Option<OsString> {
        self.0(name).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Option<String> {
        let text = self.set(name)?.to_string_lossy().trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    /// A path, with `~` and variables in it replaced as the hub's Python client does.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let value = self.set(name)?;
        let Some(text) = value.to_str() else {
            return Some(value.into());
        };
        Some(expand_variable(&self.expand_variables(text), self.home()))
    }

    fn home(&self) -> Option<PathBuf> {
        self.set("HOME").map(PathBuf::from)
    }

    /// `$NAME` and `${NAME}`; what is not set stays as it is.
    fn expand_variables(&self, text: &str) -> String {
        let mut parts = text.split('$');
        let mut out = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let braced = part.strip_prefix('{').and_then(|rest| rest.split_once('}'));
            let (name, rest) = braced.unwrap_or_else(|| {
                let end = part
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(part.len());
                part.split_at_checked(end).unwrap_or((part, ""))
            });
            match self.0(name).filter(|_| !name.is_empty()) {
                Some(value) => {
                    out.push_str(&value.to_string_lossy());
                    out.push_str(rest);
                }
                None => {
                    out.push('$');
                    out.push_str(part);
                }
            }
        }
        out
    }

    fn on(&self, name: &str) -> bool {
        self.text(name).is_some_and(|value| is_on(&value))
    }

    /// A number of seconds; anything else is as if it were not set.
    fn seconds(&self, name: &str) -> Option<Duration> {
        let seconds: u32 = self.text(name)?.parse().ok()?;
        (seconds > 0).then(|| Duration::from_secs(seconds.into()))
    }

    /// The XDG cache directory. The specification has relative paths ignored.
    fn caches(&self) -> Option<PathBuf> {
        self.path("XDG_CACHE_HOME")
            .filter(|path| path.is_absolute())
            .or_else(|| Some(self.home()?.join(".cache")))
    }

    fn root(&self) -> Result<PathBuf, SourceError> {
        self.path("ENAMEL_HOME")
            .or_else(|| Some(self.caches()?.join("enamel")))
            .ok_or(SourceError::NoCache)
    }

    /// The Python client's order: the environment, then the file of `hf auth login`.
    fn token(&self, hf_home: Option<&Path>) -> Option<String> {
        if self.on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            return None;
        }
        let named = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];
        if let Some(token) = named.iter().find_map(|name| self.text(name)) {
            return Some(token);
        }
        let path = self
            .path("HF_TOKEN_PATH")
            .or_else(|| Some(hf_home?.join("token")))?;
        let token = std::fs::read_to_string(path).ok()?.trim().to_owned();
        (!token.is_empty()).then_some(token)
    }

    /// Lower case first, as Python reads them.
    fn proxy(&self, name: &str) -> Option<String> {
        self.text(&name.to_lowercase()).or_else(|| self.text(name))
    }

    fn network(&self) -> Network {
        let patience = Network::default();
        let all = self.proxy("ALL_PROXY");
        Network {
            answer: self
                .seconds("HF_HUB_ETAG_TIMEOUT")
                .unwrap_or(patience.answer),
            stall: self
                .seconds("HF_HUB_DOWNLOAD_TIMEOUT")
                .unwrap_or(patience.stall),
            http_proxy: self.proxy("HTTP_PROXY").or_else(|| all.clone()),
            https_proxy: self.proxy("HTTPS_PROXY").or(all),
            no_proxy: self.proxy("NO_PROXY").unwrap_or_default(),
            certificates: self.path("SSL_CERT_FILE"),
        }
    }

    fn options(&self) -> Result<PullOptions, SourceError> {
        let root = self.root()?;
        let default_hf = self.caches().map(|caches| caches.join("huggingface"));
        let hf_home = self.path("HF_HOME");
        let hub_cache = self
            .path("HF_HUB_CACHE")
            .or_else(|| self.path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(hf_home.as_ref()?.join("hub")))
            .unwrap_or_else(|| root.join("hub"));
        // The Python client looks at the second only where the first is not set.
        let offline = self
            .text("HF_HUB_OFFLINE")
            .or_else(|| self.text("TRANSFORMERS_OFFLINE"));
        Ok(PullOptions {
            hub_cache,
            token: self.token(hf_home.as_deref().or(default_hf.as_deref())),
            hub_fallback: default_hf.map(|home| home.join("hub")),
            endpoint: self.text("HF_ENDPOINT").map_or_else(
                || PUBLIC_HUB.to_owned(),
                |url| url.trim_end_matches('/').to_owned(),
            ),
            hub_offline: offline.is_some_and(|value| is_on(&value)),
            offline: false,
            network: self.network(),
            root,
        })
    }
}

fn is_on(value: &str) -> bool {
    matches!(
        value.to_ascii_lowercase().as_str(),
        "1" | "true" | "yes" | "on"
    )
}

impl PullOptions {
    /// The settings that the environment asks for.
    pub fn from_env() -> Result<Self, SourceError> {
        Environment(&|name| std::env::var_os(name)).options()
    }

    /// Settings with everything under `root`, nothing from the environment.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self {
            hub_cache: root.join("hub"),
            hub_fallback: None,
            endpoint: PUBLIC_HUB.to_owned(),
            token: None,
            hub_offline: false,
            offline: false,
            network: Network::default(),
            root,
        }
    }

    /// Takes the lock of the model with this reference; it is given back when dropped, and by the
    /// system when the process dies.
    pub(super) fn lock(
        &self,
        reference: &str,
        progress: &mut dyn PullProgress,
    ) -> Result<File, SourceError> {
        let name: String = reference
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let path = self.root.join("locks").join(format!("{name}.lock"));
        super::lock::lock(&path, &mut || {
            progress.note("waiting for another pull of the same model");
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)]) -> PullOptions {
        let find = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Environment(&find).options().unwrap()
    }

    /// The same cases through huggingface_hub.constants give these paths, but for `hub` of
    /// Enamel's own cache where no variable of the hub's is set.
    #[test]
    fn the_hub_cache_is_where_the_python_client_has_it() {
        let home = ("HOME", "/h");
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[home], "/h/.cache/enamel/hub"),
            (&[home, ("HF_HOME", "~/hf")], "/h/hf/hub"),
            (&[home, ("HF_HOME", "$HOME/a/${HOME}")], "/h/a//h/hub"),
            (
                &[home, ("HF_HOME", "/x"), ("HUGGINGFACE_HUB_CACHE", "~/c")],
                "/h/c",
            ),
            (
                &[
                    home,
                    ("HF_HUB_CACHE", "~/d"),
                    ("HUGGINGFACE_HUB_CACHE", "/c"),
                ],
                "/h/d",
            ),
            (&[home, ("HF_HUB_CACHE", "")], "/h/.cache/enamel/hub"),
            (&[home, ("HF_HUB_CACHE", "/$NONE/x")], "/$NONE/x"),
        ];
        for (variables, wanted) in cases {
            assert_eq!(
                options(variables).hub_cache,
                Path::new(wanted),
                "{variables:?}"
            );
        }
        let xdg = options(&[home, ("XDG_CACHE_HOME", "/var/c")]);
        assert_eq!(xdg.hub_cache, Path::new("/var/c/enamel/hub"));
        assert_eq!(
            xdg.hub_fallback.unwrap(),
            Path::new("/var/c/huggingface/hub")
        );
    }

    #[test]
    fn the_token_is_the_first_that_is_set_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "stored-secret\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let stored = options(&[("HOME", "/h"), ("HF_HOME", home)]);
        assert_eq!(stored.token.as_deref(), Some("stored-secret"));
        let named = options(&[
            ("HOME", "/h"),
            ("HF_TOKEN_PATH", path.to_str().unwrap()),
            ("HUGGING_FACE_HUB_TOKEN", "old-secret"),
            ("HF_TOKEN", " new-secret "),
            ("HF_ENDPOINT", "https://me:pass-secret@mirror.example/"),
            ("https_proxy", "http://me:proxy-secret@proxy.example"),
        ]);
        assert_eq!(named.token.as_deref(), Some("new-secret"));
        let shown = format!("{named:?}");
        assert!(!shown.contains("secret"), "{shown}");
        let none = options(&[
            ("HOME", "/h"),
            ("HF_TOKEN", "x"),
            ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ]);
        assert_eq!(none.token, None);
    }

    #[test]
    fn offline_proxies_and_patience_are_read() {
        let home = ("HOME", "/h");
        assert!(options(&[home, ("TRANSFORMERS_OFFLINE", "YES")]).hub_offline);
        assert!(
            !options(&[home, ("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]).hub_offline
        );
        let network = options(&[
            home,
            ("ALL_PROXY", "http://all:1"),
            ("https_proxy", "http://lower:2"),
            ("HTTPS_PROXY", "http://upper:3"),
            ("HF_HUB_ETAG_TIMEOUT", "30"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "never"),
        ])
        .network;
        assert_eq!(network.http_proxy.as_deref(), Some("http://all:1"));
        assert_eq!(network.https_proxy.as_deref(), Some("http://lower:2"));
        assert_eq!(network.answer, Duration::from_secs(30));
        assert_eq!(network.stall, Duration::from_secs(60));
    }
}
