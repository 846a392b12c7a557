//! HTTP: connections, routes, who may ask, and what is told of it.

mod body;
mod connections;
mod guard;
mod journal;
mod stream;

use std::{net::TcpListener, sync::Arc};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value as Json, json};
use tokio::sync::{mpsc::Receiver, watch};

use crate::{
    api::{self, ApiError, Asked, Kind, Limits, Reply},
    engine::{Event, Queue, Refusal, Sent},
    metrics::Metrics,
    served::Served,
};
use journal::Entry;

/// What all requests share.
pub struct Shared {
    pub served: Arc<Served>,
    pub queue: Arc<Queue>,
    pub metrics: Arc<Metrics>,
    pub limits: Limits,
    pub api_key: Option<Vec<u8>>,
    /// Whether only names of this machine are taken as its name.
    pub only_loopback: bool,
    pub log: Box<dyn Fn(&str) + Send + Sync>,
}

/// Serves until `stop` is true and what was being written has ended.
///
/// # Errors
/// If the system tells nothing of the listener.
pub async fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
    stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    connections::serve(listener, router(&shared), &shared.queue, stop).await;
    Ok(())
}

fn router(shared: &Arc<Shared>) -> Router {
    let page =
        |kind: &'static str, text: &'static str| get(move || async move { file(kind, text) });
    Router::new()
        .route("/", page("text/html; charset=utf-8", include_str!("../page/chat.html")))
        .route("/chat.css", page("text/css; charset=utf-8", include_str!("../page/chat.css")))
        .route("/chat.js", page("text/javascript; charset=utf-8", include_str!("../page/chat.js")))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .method_not_allowed_fallback(wrong_method)
        .fallback(no_path)
        .layer(middleware::from_fn_with_state(Arc::clone(shared), guard::check))
        .layer(middleware::from_fn_with_state(Arc::clone(shared), journal::keep))
        .with_state(Arc::clone(shared))
}

fn document(json: &Json) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json.to_string()).into_response()
}

/// A file of the chat page, which may load nothing from elsewhere.
fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
             img-src data:;              base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ];
    (headers, text).into_response()
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    match shared.queue.is_closed() {
        false => document(&json!({ "status": "ok" })),
        true => ApiError::stopping().into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, shared.metrics.text(shared.queue.waiting())).into_response()
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    document(&json!({ "object": "list", "data": [describe(&shared.limits)] }))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    match name == shared.limits.name {
        true => Ok(document(&describe(&shared.limits))),
        false => Err(ApiError::no_model(&name, &shared.limits.name)),
    }
}

fn describe(limits: &Limits) -> Json {
    json!({
        "id": limits.name, "object": "model", "created": 0, "owned_by": "slimllm",
        "max_model_len": limits.context,
    })
}

async fn wrong_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path is asked with another method")
}

async fn no_path(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(100).collect();
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no path `{path}`"))
}

async fn chat(
    State(shared): State<Arc<Shared>>,
    Extension(entry): Extension<Arc<Entry>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    answer(Kind::Chat, shared, entry, &headers, body).await
}

async fn completion(
    State(shared): State<Arc<Shared>>,
    Extension(entry): Extension<Arc<Entry>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    answer(Kind::Completion, shared, entry, &headers, body).await
}

/// Reads a request, has its texts written, and tells them.
async fn answer(
    kind: Kind,
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    body::check_type(headers)?;
    let body = body::read(body).await?;
    let reader = Arc::clone(&shared);
    let read = move || api::read(kind, &body, &reader.served, &reader.limits);
    let read = tokio::task::spawn_blocking(read).await;
    let asked = read.map_err(|_| ApiError::internal("the request could not be read"))?;
    let Asked { jobs, news, reply, stream } = asked?;
    shared.queue.push(jobs).map_err(|refusal| match refusal {
        Refusal::Full => {
            let rows = shared.queue.waiting().div_ceil(shared.limits.parallel);
            ApiError::full(rows.clamp(1, 60) as u64)
        }
        Refusal::Closed => ApiError::stopping(),
    })?;
    match stream {
        true => {
            let pieces = Body::from_stream(stream::pieces(shared, entry, news, reply));
            let headers = [
                (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
                (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            ];
            Ok((headers, pieces).into_response())
        }
        false => whole(&shared, &entry, news, reply).await,
    }
}

/// Waits for all texts.
async fn whole(
    shared: &Shared,
    entry: &Entry,
    mut news: Receiver<Sent>,
    mut reply: Reply,
) -> Result<Response, ApiError> {
    while !reply.is_whole() {
        match news.recv().await.map(|sent| (sent.choice, sent.event)) {
            Some((choice, Event::Written { text, tokens, end })) => {
                reply.push(choice, &text, &tokens, end, shared.served.tokenizer());
            }
            Some((_, Event::Failed(reason))) => return Err(ApiError::internal(reason)),
            Some((_, Event::Stopped)) | None => return Err(ApiError::stopping()),
        }
    }
    entry.tell(reply.counts());
    Ok(document(&reply.whole()))
}
