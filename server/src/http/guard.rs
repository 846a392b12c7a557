//! Who may ask.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::ConstantTimeEq;

use super::Shared;
use crate::api::ApiError;

/// Lets a request through, or refuses it.
pub async fn check(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    match refusal(&shared, request.uri().path(), request.headers()) {
        Some(error) => error.into_response(),
        None => next.run(request).await,
    }
}

fn refusal(shared: &Shared, path: &str, headers: &HeaderMap) -> Option<ApiError> {
    if shared.only_loopback
        && !headers.get(header::HOST).is_some_and(|host| is_loopback(host.as_bytes()))
    {
        let message = "the `Host` of the request is not this machine: serve with `--api-key` to be \
                       asked by another name";
        return Some(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    let key = shared.api_key.as_ref()?;
    // The page asks for the key; probes of containers have none.
    let is_open = ["/", "/chat.css", "/chat.js", "/health"].contains(&path);
    (!is_open && !is_key(key, headers)).then(ApiError::no_key)
}

fn is_key(key: &[u8], headers: &HeaderMap) -> bool {
    let sent = headers.get(header::AUTHORIZATION).map(|sent| sent.as_bytes());
    let sent = sent.and_then(|sent| sent.strip_prefix(b"Bearer "));
    // How long a wrong key takes does not tell how much of it is right.
    sent.is_some_and(|sent| sent.ct_eq(key).into())
}

/// Whether a `Host` is a name of this machine's own address, with or without a port.
fn is_loopback(host: &[u8]) -> bool {
    let host = String::from_utf8_lossy(host);
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => &host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine_are_told_from_others() {
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:80", "[::1]:8080"] {
            assert!(is_loopback(host.as_bytes()), "{host}");
        }
        for host in ["", "example.com", "localhost.example.com:80", "10.0.0.1:80", "127.0.0.1.x"] {
            assert!(!is_loopback(host.as_bytes()), "{host}");
        }
    }
}
