//! A server from its first to its last connection.

use std::{
    io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use slim_runtime::Model;
use tokio::sync::watch;

use crate::{
    Result, ServerError,
    api::Limits,
    engine::{Engine, Queue},
    http::{self, Shared},
    metrics::Metrics,
    served::Served,
};

/// Threads that talk with clients.
const HTTP_THREADS: usize = 2;

/// Threads that read requests: templates, tokens, grammars.
const READING_THREADS: usize = 4;

/// How a model is served.
pub struct Settings {
    /// What it is called.
    pub name: String,
    /// Texts that are written at a time.
    pub parallel: usize,
    /// Tokens of each of them, prompt included.
    pub context: usize,
    /// Texts that may wait.
    pub queue: usize,
    /// What clients must know.
    pub api_key: Option<String>,
    /// Takes a line for each request.
    pub log: Box<dyn Fn(&str) + Send + Sync>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "model".to_owned(),
            parallel: 8,
            context: slim_runtime::DEFAULT_CONTEXT,
            queue: 64,
            api_key: None,
            log: Box::new(|_| ()),
        }
    }
}

/// A model that can be asked at an address.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
    engine: JoinHandle<()>,
    stopper: Stopper,
}

/// Stops a server, from any thread.
#[derive(Clone)]
pub struct Stopper(watch::Sender<bool>);

impl Stopper {
    /// Lets no more requests in. What is being written has some time to end.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Server {
    /// Takes memory for the texts and listens.
    ///
    /// # Errors
    /// `Runtime` if the machine has no memory for so many texts, or if the model's tokenizer or
    /// chat template is broken; `Host` and `Bind` if the address cannot be listened at.
    pub fn bind(model: Model, host: &str, port: u16, settings: Settings) -> Result<Self> {
        let (listener, address) = listen(host, port)?;
        let Settings { name, parallel, context, queue, api_key, log } = settings;
        let served = Arc::new(Served::load(model)?);
        let queue = Arc::new(Queue::new(parallel, queue));
        let metrics = Arc::new(Metrics::default());
        let stopper = Stopper(watch::Sender::new(false));
        let limits = Limits { name, context, parallel };
        let shared = Shared {
            served,
            queue,
            metrics,
            // A page that has taken over a name could not know a key.
            only_loopback: api_key.is_none() && address.ip().is_loopback(),
            api_key: api_key.map(String::into_bytes),
            limits,
            log,
        };
        let shared = Arc::new(shared);
        let engine = start_engine(&shared, stopper.clone())?;
        Ok(Self { listener, address, shared, engine, stopper })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What is odd about the model, a sentence each.
    pub fn warnings(&self) -> &[String] {
        self.shared.served.warnings()
    }

    /// What stops it.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Serves until it is stopped.
    ///
    /// # Errors
    /// `Start` if the system gives no threads; `Engine` if writing texts has failed for good.
    pub fn run(self) -> Result<()> {
        let Self { listener, shared, engine, stopper, .. } = self;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(HTTP_THREADS)
            .max_blocking_threads(READING_THREADS)
            .enable_all()
            .build()
            .map_err(ServerError::Start)?;
        let served =
            runtime.block_on(http::serve(listener, Arc::clone(&shared), stopper.0.subscribe()));
        shared.queue.end();
        runtime.shutdown_background();
        let written = engine.join();
        served.map_err(ServerError::Start)?;
        written.map_err(|_| ServerError::Engine)
    }
}

fn listen(host: &str, port: u16) -> Result<(TcpListener, SocketAddr)> {
    let no_host = |source| ServerError::Host { host: host.to_owned(), source };
    let mut addresses = (host, port).to_socket_addrs().map_err(no_host)?;
    let none = || no_host(io::Error::other("the name has no address"));
    let address = addresses.next().ok_or_else(none)?;
    let cannot = |source| ServerError::Bind { address, source };
    let listener = TcpListener::bind(address).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    Ok((listener, address))
}

/// Starts the thread that writes texts; it makes the sequences, as CUDA devices want it.
fn start_engine(shared: &Arc<Shared>, stopper: Stopper) -> Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    let (tell, told) = mpsc::channel();
    let write = move || {
        let Shared { served, queue, metrics, limits, .. } = &*shared;
        let _end = EndOfEngine { queue, stopper };
        match Engine::new(served, queue, metrics, limits.parallel, limits.context) {
            Ok(engine) => {
                let _ = tell.send(Ok(()));
                engine.run();
            }
            Err(error) => drop(tell.send(Err(error))),
        }
    };
    let thread = std::thread::Builder::new().name("engine".to_owned());
    let thread = thread.spawn(write).map_err(ServerError::Start)?;
    told.recv().map_err(|_| ServerError::Engine)??;
    Ok(thread)
}

/// However the engine ends, nobody waits for it any more.
struct EndOfEngine<'a> {
    queue: &'a Queue,
    stopper: Stopper,
}

impl Drop for EndOfEngine<'_> {
    fn drop(&mut self) {
        self.queue.end();
        self.stopper.stop();
    }
}
