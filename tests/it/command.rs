//! Running the built command.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

/// A temporary folder.
pub struct Dir(TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The path of a file in it, as an argument.
    pub fn arg(&self, name: &str) -> String {
        arg(&self.path(name))
    }

    /// Writes a file and gives its path, as an argument.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), content).unwrap();
        self.arg(name)
    }

    /// The names of the files in it.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The command, to be started in this folder by the caller.
    pub fn slimllm(&self, subcommand: &str) -> Command {
        let mut command = command(&[subcommand]);
        command.current_dir(self.root());
        command
    }
}

/// A path as an argument.
pub fn arg(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A tiny model of the repository.
pub fn tiny_model(name: &str) -> PathBuf {
    test_data("archs").join(name)
}

/// The tiny models of all families.
pub fn golden_models() -> Vec<PathBuf> {
    files_in(&test_data("archs"))
}

/// What is in a folder, by name.
pub fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{}", folder.display());
    paths
}

/// A text to calibrate on, where it does not matter which. The built-in one is 18 times as long,
/// and takes longer to tokenize than a tiny model takes to convert.
pub const SHORT_TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/converter/data/alice.txt");

/// The options that calibrate on [`SHORT_TEXT`], unless rounding to nearest, which takes no text,
/// is among the others.
pub fn short_text(others: &[&str]) -> &'static [&'static str] {
    if others.contains(&"rtn") { &[] } else { &["--calibration", SHORT_TEXT] }
}

/// A folder of test data.
pub fn test_data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// The tiny model `llama` as an ONNX model, in a folder of its own: an export by `script` or
/// `dynamo`.
pub fn onnx_model(exporter: &str) -> (Dir, PathBuf) {
    let dir = Dir::new();
    let llama = tiny_model("llama");
    let export = llama.join("../../onnx").join(exporter);
    for folder in [&llama, &export] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name != "model.safetensors" {
                std::fs::copy(&path, dir.path(name)).unwrap();
            }
        }
    }
    let model = dir.path("model.onnx");
    (dir, model)
}

/// The model that `scripts/fetch-model` fetches, if the environment tells where it is.
pub fn real_model() -> Option<PathBuf> {
    let model = std::env::var_os("SLIMLLM_TEST_MODEL");
    if model.is_none() {
        println!("skipped: SLIMLLM_TEST_MODEL is not set; run `make test`");
    }
    model.map(PathBuf::from)
}

/// The library ONNX Runtime from PyPI, if the environment tells where it is.
pub fn onnx_runtime() -> Option<PathBuf> {
    let library = std::env::var_os("SLIMLLM_TEST_ONNXRUNTIME");
    if library.is_none() {
        println!("skipped: SLIMLLM_TEST_ONNXRUNTIME is not set; run `make test`");
    }
    library.map(PathBuf::from)
}

/// What the command answered.
pub struct Answer {
    /// What was run.
    command: String,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    /// Runs a command.
    pub fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        Self {
            command: format!("{command:?}"),
            code: output.status.code().expect("the command ends by itself"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Checks that it is a success.
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}{}", self.command, self.stdout, self.stderr);
        self
    }

    /// Checks that it is a failure with exit code 2 and a message that has all `fragments`.
    pub fn fails(&self, fragments: &[&str]) {
        let Self { command, code, stdout, stderr } = self;
        assert_eq!(*code, 2, "{command}\n{stdout}{stderr}");
        for fragment in fragments {
            assert!(stderr.contains(fragment), "{command}: no `{fragment}` in\n{stderr}");
        }
        assert_eq!(stdout, "", "{command}: talk belongs on stderr");
    }

    /// The JSON document on stdout.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}\n{}{}", self.stdout, self.stderr))
    }
}

/// The command, to be started by the caller. It asks no hub.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slimllm"));
    command.args(args).env("HF_HUB_OFFLINE", "1");
    command
}

/// Runs the command, whatever it answers.
pub fn slimllm(args: &[&str]) -> Answer {
    Answer::of(&mut command(args))
}

/// Runs the command, which must succeed.
pub fn succeed(args: &[&str]) -> Answer {
    slimllm(args).succeeds()
}

/// Runs the command, which must fail with exit code 2 and a message that has all `fragments`.
pub fn fail(args: &[&str], fragments: &[&str]) {
    slimllm(args).fails(fragments);
}
