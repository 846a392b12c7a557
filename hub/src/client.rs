//! Requests to the hub, and where they are redirected to.

use std::{io::Read, sync::Arc, time::Duration};

use ureq::{
    Agent, Body, Error, Timeout,
    http::{Response, Uri, header},
    tls::{RootCerts, TlsConfig},
};

use crate::{HubError, HubId, Result, Settings, error::Refusal};

/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 5;

/// Until there is a connection; until the next bytes come.
const CONNECT: Duration = Duration::from_secs(15);
const READ: Duration = Duration::from_secs(30);

/// Asks a hub for what belongs to a model.
pub struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    id: &'a HubId,
}

impl<'a> Client<'a> {
    /// Nothing is asked yet.
    pub fn new(settings: &'a Settings, id: &'a HubId) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .user_agent(concat!("slimllm/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(READ))
            .timeout_per_read(Some(READ))
            .build();
        Self { agent: config.new_agent(), settings, id }
    }

    /// The address of the hub.
    pub fn endpoint(&self) -> &str {
        &self.settings.endpoint
    }

    /// Where the hub lists the files of the model's revision.
    pub fn listing_path(&self) -> String {
        let (repository, revision) = (self.id.repository(), self.id.revision());
        format!("/api/models/{repository}/revision/{}?blobs=true", encoded(revision, ""))
    }

    /// Where a file of a commit is.
    pub fn file_path(&self, commit: &str, name: &str) -> String {
        format!("/{}/resolve/{commit}/{}", self.id.repository(), encoded(name, "/"))
    }

    /// What the model is called.
    pub fn id(&self) -> &HubId {
        self.id
    }

    /// A text of so many bytes at most.
    pub fn text(&self, path: &str, max_bytes: u64) -> Result<Vec<u8>> {
        let response = self.get(path, 0)?;
        let mut text = Vec::new();
        let reader = response.into_body().into_reader();
        reader.take(max_bytes + 1).read_to_end(&mut text).map_err(|error| {
            let reason = error.to_string();
            HubError::Connection { host: self.settings.endpoint.clone(), reason }
        })?;
        if text.len() as u64 > max_bytes {
            return Err(HubError::Answer {
                of: format!("{}{path}", self.settings.endpoint),
                found: format!("more than {max_bytes} bytes"),
                expected: "a shorter list",
            });
        }
        Ok(text)
    }

    /// What lies at a path of the hub, from a byte on: an answer with status 200, 206 or 416.
    /// Redirects are followed; other hosts do not get the token.
    pub fn get(&self, path: &str, from: u64) -> Result<Response<Body>> {
        let hub = Address::parse(&self.settings.endpoint)?;
        let mut address = Address::parse(&format!("{}{path}", self.settings.endpoint))?;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&address.url);
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = &self.settings.token
                && address.origin == hub.origin
            {
                request = request.header(header::AUTHORIZATION, token.header());
            }
            let response = request.call().map_err(|error| {
                let (host, reason) = (address.origin.clone(), error.to_string());
                match is_before_connection(&error) {
                    true => HubError::Unreached { host, reason },
                    false => HubError::Connection { host, reason },
                }
            })?;
            match response.status().as_u16() {
                200 | 206 | 416 => return Ok(response),
                301 | 302 | 303 | 307 | 308 => address = address.redirected(&response)?,
                status => return Err(self.failure(path, status, &response, &address, &hub)),
            }
        }
        Err(HubError::Answer {
            of: format!("{}{path}", self.settings.endpoint),
            found: format!("more than {MAX_REDIRECTS} redirects"),
            expected: "a file",
        })
    }

    /// The error for a status that is no success, of what lies at a path of the hub.
    fn failure(
        &self,
        path: &str,
        status: u16,
        response: &Response<Body>,
        address: &Address,
        hub: &Address,
    ) -> HubError {
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let refusal = match (status, text("x-error-code")) {
            (408 | 429 | 500..=599, _) => {
                let seconds = text("retry-after").and_then(|seconds| seconds.parse().ok());
                return HubError::Busy {
                    host: address.origin.clone(),
                    status,
                    pause: seconds.map(Duration::from_secs),
                };
            }
            // What a store of files says is no word of the hub.
            _ if address.origin != hub.origin => Refusal::Other(status),
            (401, _) => Refusal::WhoAsks,
            (403, _) => Refusal::NotAllowed,
            (404, Some("RevisionNotFound")) => Refusal::NoRevision,
            (404, _) if path.contains("/resolve/") => Refusal::NoFile,
            (404, _) => Refusal::NoRepository,
            _ => Refusal::Other(status),
        };
        HubError::Refused {
            id: self.id.to_string(),
            refusal,
            endpoint: self.settings.endpoint.clone(),
            token: self.settings.token.as_ref().map(|token| token.origin().to_owned()),
        }
    }
}

/// Whether a request failed before there was a connection.
fn is_before_connection(error: &Error) -> bool {
    use std::io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock,
    };
    match error {
        // A name without an address has no kind of its own, and a certificate is invalid data.
        Error::Io(error) => !matches!(
            error.kind(),
            BrokenPipe
                | ConnectionAborted
                | ConnectionReset
                | TimedOut
                | UnexpectedEof
                | WouldBlock
        ),
        Error::HostNotFound
        | Error::ConnectionFailed
        | Error::InvalidProxyUrl
        | Error::ConnectProxyFailed(_)
        | Error::Tls(_)
        | Error::Rustls(_)
        | Error::Timeout(Timeout::Resolve | Timeout::Connect) => true,
        _ => false,
    }
}

/// An absolute URL.
struct Address {
    url: String,
    /// What stands before the path.
    base: String,
    /// Scheme, host and port, each always said and in one spelling.
    origin: String,
}

impl Address {
    fn parse(url: &str) -> Result<Self> {
        let no_address = || HubError::Answer {
            of: url.chars().take(80).collect(),
            found: "no address of a server".to_owned(),
            expected: "one that begins with `https://`",
        };
        let uri: Uri = url.parse().map_err(|_| no_address())?;
        let (scheme, usual_port) = match uri.scheme_str() {
            Some("https") => ("https", 443),
            Some("http") => ("http", 80),
            _ => return Err(no_address()),
        };
        let authority = uri.authority().ok_or_else(no_address)?;
        let host = authority.host().to_ascii_lowercase();
        let port = authority.port_u16().unwrap_or(usual_port);
        Ok(Self {
            url: url.to_owned(),
            base: format!("{scheme}://{authority}"),
            origin: format!("{scheme}://{host}:{port}"),
        })
    }

    /// Where an answer from here says that the file is.
    fn redirected(&self, response: &Response<Body>) -> Result<Self> {
        let location = response.headers().get(header::LOCATION);
        let location = location.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let target = match location {
            path if path.starts_with('/') && !path.starts_with("//") => {
                Self::parse(&format!("{}{path}", self.base))?
            }
            url => Self::parse(url)?,
        };
        if self.origin.starts_with("https:") && !target.origin.starts_with("https:") {
            return Err(HubError::Answer {
                of: self.origin.clone(),
                found: format!("a redirect to {}", target.origin),
                expected: "one to `https://`",
            });
        }
        Ok(target)
    }
}

/// A text as a part of an URL: everything but plain characters and `kept` is escaped.
fn encoded(text: &str, kept: &str) -> String {
    let is_kept = |byte: u8| {
        byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || kept.as_bytes().contains(&byte)
    };
    let escaped = |byte: u8| match is_kept(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redirect(from: &str, location: &str) -> Result<String> {
        let response = Response::builder().header("location", location);
        let response = response.body(Body::builder().data("")).unwrap();
        Address::parse(from)?.redirected(&response).map(|address| address.url)
    }

    #[test]
    fn redirects_lead_to_servers_and_never_from_https_to_http() {
        let hub = "https://Hub.example/a/b";
        assert_eq!(redirect(hub, "/c?d=e").unwrap(), "https://Hub.example/c?d=e");
        assert_eq!(redirect(hub, "https://store/x").unwrap(), "https://store/x");
        for location in ["http://hub.example/x", "//store/x", "x", "", "file:///etc/passwd"] {
            assert!(redirect(hub, location).is_err(), "{location}");
        }
        assert_eq!(redirect("http://a:1/", "http://b/").unwrap(), "http://b/");
    }

    #[test]
    fn origin_is_told_from_what_looks_like_it() {
        let origin = |url: &str| Address::parse(url).unwrap().origin;
        assert_eq!(origin("https://HUB/x"), origin("https://hub:443"));
        for url in ["http://hub", "https://hub:8443", "https://hub@other", "https://hub.other"] {
            assert_ne!(origin("https://hub"), origin(url), "{url}");
        }
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b/ü?#%", "/"), "a%20b/%C3%BC%3F%23%25");
    }
}
