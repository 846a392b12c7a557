//! What a client is told that cannot be served.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value as Json, json};

/// An error in OpenAI's form.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    message: String,
    /// The field of the request.
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds.
    retry_after: Option<u64>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A request that cannot be read.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field whose value cannot be used.
    pub fn value(param: &str, message: impl Into<String>) -> Self {
        let message = format!("`{param}`: {}", message.into());
        Self { param: Some(param.to_owned()), ..Self::bad(message) }
    }

    /// A prompt that the context has no room for.
    pub fn too_long(tokens: usize, context: usize) -> Self {
        let message = format!(
            "the prompt has {tokens} tokens, but a text may have {context}, and one at least is to \
             be written"
        );
        Self { code: Some("context_length_exceeded"), ..Self::bad(message) }
    }

    /// Another model than the one that is served.
    pub fn no_model(found: &str, served: &str) -> Self {
        let message = format!("there is no model `{found}` here: the one served is `{served}`");
        let error = Self::new(StatusCode::NOT_FOUND, message);
        Self { param: Some("model".to_owned()), code: Some("model_not_found"), ..error }
    }

    pub fn no_key() -> Self {
        let message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`";
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// All places are taken; one is free after about so many seconds.
    pub fn full(retry_after: u64) -> Self {
        let message = format!("too many texts wait already: try again in {retry_after} s");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        Self { code: Some("queue_full"), retry_after: Some(retry_after), ..error }
    }

    pub fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server stops")
    }

    /// Our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// The body of the answer.
    pub fn to_json(&self) -> Json {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.to_json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
