//! A server that was started for a test, and a plain client for it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Stdio},
    sync::{Arc, LazyLock, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::command::{Dir, arg, command, succeed, tiny_model};

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A packed tiny model for texts of a length that takes seconds.
static MODEL: LazyLock<Dir> = LazyLock::new(|| {
    let dir = Dir::new();
    for entry in std::fs::read_dir(tiny_model("llama")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
    }
    let config = std::fs::read_to_string(dir.path("config.json")).unwrap();
    let longer = config.replace("_embeddings\": 512", "_embeddings\": 1048576");
    dir.write("config.json", longer);
    let out = dir.arg("tiny.slim.gguf");
    succeed(&["convert", &arg(dir.root()), "-o", &out, "--method", "rtn", "--quiet"]);
    dir
});

/// The file of the model that is served.
pub fn model() -> String {
    MODEL.arg("tiny.slim.gguf")
}

/// A server of the tiny model.
pub struct Server {
    pub child: Child,
    pub address: String,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(flags: &[&str]) -> Self {
        let mut serve = command(&["serve", &model(), "--port", "0", "--device", "cpu"]);
        serve.args(["--threads", "1"]).args(flags).env_remove("SLIMLLM_API_KEY");
        let mut child = serve.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let talk = lines.by_ref().map(Result::unwrap).find(|line| line.starts_with("serving"));
        let talk = talk.expect("the server tells its address");
        let (_, behind) = talk.split_once("http://").unwrap();
        let address = behind.split(' ').next().unwrap().to_owned();
        let log = Arc::new(Mutex::new(String::new()));
        let written = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| {
                *written.lock().unwrap() += &(line + "\n");
            });
        });
        Self { child, address, log, reader: Some(reader) }
    }

    pub fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.send("POST", path, &[("Content-Type", "application/json")], &body.to_string())
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let mut stream = self.open(method, path, headers, body);
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Response::parse(&bytes)
    }

    /// Sends a request, and gives the connection on which the answer comes.
    pub fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let headers: String =
            headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\
             {headers}\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    /// Begins a text of so many tokens; it has begun.
    pub fn begin_text(&self, tokens: usize) -> TcpStream {
        let body = json!({"prompt": "the", "max_tokens": tokens, "stream": true, "temperature": 0,
                          "logit_bias": {"268": -100, "270": -100}});
        let json = [("Content-Type", "application/json")];
        let mut stream = self.open("POST", "/v1/completions", &json, &body.to_string());
        stream.read_exact(&mut [0; 400]).unwrap();
        stream
    }

    /// The number of a sample of the metrics.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.parse().unwrap())
    }

    /// Waits until a sample of the metrics has this number.
    pub fn wait_for(&self, name: &str, number: f64) {
        let start = Instant::now();
        while self.metric(name) != number {
            assert!(start.elapsed() < PATIENCE, "{name}: {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, name: &str) {
        let mut kill = std::process::Command::new("kill");
        let status = kill.args(["-s", name, &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end; gives its exit code, and what it told after its address.
    pub fn end(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap();
        self.reader.take().unwrap().join().unwrap();
        let log = self.log.lock().unwrap().clone();
        (status.code(), log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: String,
    pub text: String,
}

impl Response {
    fn parse(bytes: &[u8]) -> Self {
        let bytes = String::from_utf8(bytes.to_vec()).unwrap();
        let (headers, body) = bytes.split_once("\r\n\r\n").unwrap();
        let headers = headers.to_lowercase();
        let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
        let text = match headers.contains("transfer-encoding: chunked") {
            true => unchunked(body),
            false => body.to_owned(),
        };
        Self { status, headers, text }
    }

    /// Its document, of a success.
    pub fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Checks that it is an error with this status whose message has `fragment`.
    pub fn fails(&self, status: u16, fragment: &str) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        let json: Value = serde_json::from_str(&self.text).unwrap();
        let message = json["error"]["message"].as_str().unwrap();
        assert!(message.contains(fragment), "`{fragment}` in: {message}");
        json["error"].clone()
    }

    /// The documents of a stream, which has ended as it should.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let mut blocks: Vec<_> = self.text.split("\n\n").collect();
        assert_eq!(blocks.split_off(blocks.len() - 2), ["data: [DONE]", ""]);
        let data = |block: &str| serde_json::from_str(block.strip_prefix("data: ").unwrap());
        blocks.into_iter().map(|block| data(block).unwrap()).collect()
    }
}

fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        text += &rest[..length];
        body = &rest[length + 2..];
    }
    text
}
