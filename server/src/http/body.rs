//! Bodies of requests, within their limits.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::BodyExt;

use crate::api::ApiError;

/// The longest body that is read.
const MAX_BYTES: usize = 2 << 20;

/// Of longer ones so much is let by, so that a client that sends without listening gets its answer.
const MAX_PASSED_BYTES: usize = 32 << 20;

/// How long a body may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Refuses what a page of another site may send without asking first.
pub fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default();
    match kind.trim().eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => {
            let message = "the body must be JSON: send `Content-Type: application/json`";
            Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}

/// The bytes of a body.
///
/// # Errors
/// If it is too long, too slow, or cut short.
pub async fn read(body: Body) -> Result<Vec<u8>, ApiError> {
    let slow = || ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took more than 30 s");
    tokio::time::timeout(PATIENCE, read_all(body)).await.map_err(|_| slow())?
}

async fn read_all(mut body: Body) -> Result<Vec<u8>, ApiError> {
    let (mut bytes, mut passed) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad("the body was cut short"))?;
        let Ok(data) = frame.into_data() else { continue };
        passed += data.len();
        if passed <= MAX_BYTES {
            bytes.extend_from_slice(&data);
        } else if passed > MAX_PASSED_BYTES {
            break;
        }
    }
    match passed <= MAX_BYTES {
        true => Ok(bytes),
        false => {
            let message = format!("the body has more than {MAX_BYTES} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
    }
}
