//! A stand-in for a hub: it serves a repository as hubs do, and fails as a test wants it to.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit of every repository here.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    pub token: Option<String>,
    /// The first byte that is asked for.
    pub from: usize,
}

/// An answer.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub cut: usize,
    /// Whether it stays open then, silently.
    pub is_stalled: bool,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: usize::MAX, is_stalled: false }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn cut(mut self, bytes: usize) -> Self {
        self.cut = bytes;
        self
    }

    pub fn stalled(mut self) -> Self {
        self.is_stalled = true;
        self
    }

    fn write(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        write!(stream, "HTTP/1.1 {} X\r\nConnection: close\r\n", self.status)?;
        write!(stream, "Content-Length: {}\r\n", self.body.len())?;
        self.headers.iter().try_for_each(|(name, value)| write!(stream, "{name}: {value}\r\n"))?;
        stream.write_all(b"\r\n")?;
        stream.write_all(&self.body[..self.body.len().min(self.cut)])?;
        if self.is_stalled {
            // Until the other side is gone.
            let _ = stream.read(&mut [0]);
        }
        Ok(())
    }
}

/// A server, with a thread for each connection.
pub struct StandIn {
    pub address: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl StandIn {
    /// Answers each request; the number is how many with the same path came before.
    pub fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::<Request>::new()));
        let (requests, answer) = (Arc::clone(&log), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, answer) = (stream.unwrap(), Arc::clone(&answer));
                let requests = Arc::clone(&requests);
                std::thread::spawn(move || {
                    let Some(request) = read(&stream) else { return };
                    let before = {
                        let mut requests = requests.lock().unwrap();
                        let same = requests.iter().filter(|other| other.path == request.path);
                        let before = same.count();
                        requests.push(request.clone());
                        before
                    };
                    // Whoever has heard enough hangs up.
                    let _ = answer(&request, before).write(&mut stream);
                });
            }
        });
        Self { address, log }
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How often something was asked whose path has `part`.
    pub fn count(&self, part: &str) -> usize {
        self.requests().iter().filter(|request| request.path.contains(part)).count()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, token: None, from: 0 };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.token = Some(value.to_owned()),
            "range" => {
                request.from = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()?;
            }
            _ => {}
        }
    }
    Some(request)
}

/// What a hub has under an id.
#[derive(Clone, Default)]
pub struct Repository {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Where files in LFS lie; the hub itself if it is empty.
    pub store: String,
}

impl Repository {
    /// With the files of a folder.
    pub fn of(folder: &Path) -> Self {
        let mut repository = Self::default();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            repository.add(name, std::fs::read(&path).unwrap());
        }
        repository
    }

    pub fn add(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.files.insert(name.to_owned(), bytes.into());
    }

    /// What a hub answers, whose model `org/name` this is.
    pub fn answer(&self, request: &Request) -> Reply {
        let path = request.path.as_str();
        if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
            return match revision.strip_suffix("?blobs=true") {
                Some("main" | "v1" | COMMIT) => Reply::new(200, self.listing().to_string()),
                _ => Reply::new(404, "").header("X-Error-Code", "RevisionNotFound"),
            };
        }
        if let Some(name) = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")) {
            return match self.files.get(name) {
                Some(_) if is_large(name) => Reply::new(302, "moved")
                    .header("Location", format!("{}/store/{name}", self.store)),
                Some(bytes) => ranged(bytes, request.from),
                None => Reply::new(404, "").header("X-Error-Code", "EntryNotFound"),
            };
        }
        match path.strip_prefix("/store/").and_then(|name| self.files.get(name)) {
            Some(bytes) => ranged(bytes, request.from),
            None => Reply::new(404, "").header("X-Error-Code", "RepoNotFound"),
        }
    }

    /// The list of its files.
    pub fn listing(&self) -> Value {
        let file = |(name, bytes): (&String, &Vec<u8>)| {
            let mut sibling = json!({
                "rfilename": name, "size": bytes.len(), "blobId": git_hash(bytes),
            });
            if is_large(name) {
                sibling["lfs"] = json!({
                    "size": bytes.len(), "sha256": sha256(bytes), "pointerSize": 134,
                });
            }
            sibling
        };
        json!({"sha": COMMIT, "siblings": self.files.iter().map(file).collect::<Vec<_>>()})
    }
}

fn is_large(name: &str) -> bool {
    [".safetensors", ".gguf", ".bin"].iter().any(|extension| name.ends_with(extension))
}

/// The bytes from one on, if it is not the first with the status that belongs to it.
fn ranged(bytes: &[u8], from: usize) -> Reply {
    let all = bytes.len();
    match from {
        0 => Reply::new(200, bytes),
        from if from < all => Reply::new(206, &bytes[from..])
            .header("Content-Range", format!("bytes {from}-{}/{all}", all - 1)),
        _ => Reply::new(416, "").header("Content-Range", format!("bytes */{all}")),
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub fn git_hash(bytes: &[u8]) -> String {
    let header = format!("blob {}\0", bytes.len());
    hex(&Sha1::new().chain_update(header).chain_update(bytes).finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
