//! A line for each request, when its answer has left or its client has.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU16, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use hyper::body::{Frame, SizeHint};

use super::Shared;

/// The paths that are counted by name.
const PATHS: [&str; 7] = [
    "/",
    "/chat.css",
    "/chat.js",
    "/health",
    "/metrics",
    "/v1/chat/completions",
    "/v1/completions",
];

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// What will be told of a request. It is, when the last who holds it lets go.
pub struct Entry {
    shared: Arc<Shared>,
    began: Instant,
    peer: Option<SocketAddr>,
    method: String,
    path: String,
    /// 0 until there is an answer.
    status: AtomicU16,
    counts: OnceLock<[usize; 3]>,
}

impl Entry {
    /// Tokens of the prompts, those that were not computed again, and those written.
    pub fn tell(&self, counts: [usize; 3]) {
        let _ = self.counts.set(counts);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let (path, status) = (self.path.as_str(), self.status.load(Relaxed));
        let known = PATHS.into_iter().find(|known| *known == path);
        let known = known.unwrap_or(match path.starts_with("/v1/models") {
            true => "/v1/models",
            false => "other",
        });
        self.shared.metrics.count_request(known, status);
        let peer = self.peer.map_or_else(String::new, |peer| format!("{peer} "));
        let told = match self.counts.get() {
            Some([prompt, reused, written]) => {
                format!("; prompt {prompt} ({reused} reused), written {written}")
            }
            None => String::new(),
        };
        let status = match status {
            0 => "no answer".to_owned(),
            status => status.to_string(),
        };
        let (method, seconds) = (&self.method, self.began.elapsed().as_secs_f64());
        (self.shared.log)(&format!("{peer}{method} {path} {status} {seconds:.2} s{told}"));
    }
}

/// Keeps an entry of a request as long as it is being answered.
pub async fn keep(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let entry = Arc::new(Entry {
        began: Instant::now(),
        peer: request.extensions().get::<Peer>().map(|peer| peer.0),
        method: request.method().as_str().chars().take(16).collect(),
        path: request.uri().path().chars().take(80).collect(),
        status: AtomicU16::new(0),
        counts: OnceLock::new(),
        shared,
    });
    request.extensions_mut().insert(Arc::clone(&entry));
    let response = next.run(request).await;
    entry.status.store(response.status().as_u16(), Relaxed);
    response.map(|body| Body::new(Kept { body, _entry: entry }))
}

/// A body that holds an entry.
struct Kept {
    body: Body,
    _entry: Arc<Entry>,
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
