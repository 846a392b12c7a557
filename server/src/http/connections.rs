//! Connections, from the first to the last.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{Router, extract::Request};
use futures_util::future::select;
use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{Sleep, sleep, timeout},
};

use super::journal::Peer;
use crate::engine::Queue;

/// Connections at a time; others wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;

/// Bytes of the headers of a request, at most.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// How long headers may take to come.
const HEADER_PATIENCE: Duration = Duration::from_secs(30);

/// How long a client may take no byte.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// How long texts may go on when the server is to stop.
const GRACE: Duration = Duration::from_secs(30);

/// How long answers may take to leave after that.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The pause after a connection that the system could not give.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until `stop` is true; then lets answers end.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    queue: &Queue,
    mut stop: watch::Receiver<bool>,
) {
    let connections = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accept = async {
        loop {
            let permit = Arc::clone(&room).acquire_owned().await;
            let Ok((stream, peer)) = listener.accept().await else {
                sleep(PAUSE).await;
                continue;
            };
            // Pieces of an answer are not to wait for one another.
            let _ = stream.set_nodelay(true);
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEADER_PATIENCE);
            builder.max_buf_size(MAX_HEADER_BYTES);
            let routes = TowerToHyperService::new(router.clone());
            let io = TokioIo::new(Patient { stream, deadline: None });
            let connection = builder.serve_connection(io, From { peer: Peer(peer), routes });
            let connection = connections.watch(connection);
            tokio::spawn(async move {
                // Clients that go in the middle are no news.
                let _ = connection.await;
                drop(permit);
            });
        }
    };
    let wish = std::pin::pin!(stop.wait_for(|stop| *stop));
    select(std::pin::pin!(accept), wish).await;
    drop(listener);
    queue.close();
    let mut ended = std::pin::pin!(connections.shutdown());
    if timeout(GRACE, &mut ended).await.is_err() {
        queue.end();
        let _ = timeout(LAST_WORDS, ended).await;
    }
}

/// Routes that know who asks.
struct From {
    peer: Peer,
    routes: TowerToHyperService<Router>,
}

impl Service<Request<Incoming>> for From {
    type Response = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Response;
    type Error = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Error;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.peer);
        self.routes.call(request)
    }
}

/// A connection that ends if its client takes no byte for long.
struct Patient {
    stream: TcpStream,
    /// While a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn poll_patiently<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let written = write(Pin::new(&mut self.stream), context);
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(WRITE_PATIENCE)));
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_patiently(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_patiently(context, |stream, context| stream.poll_write_vectored(context, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_patiently(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_patiently(context, |stream, context| stream.poll_shutdown(context))
    }
}
