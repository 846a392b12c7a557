//! Running the built command.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

/// A temporary folder.
pub struct Dir(TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Writes a file and gives its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// The names of the files in it.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// What the command answered.
pub struct Answer {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    fn new(output: Output) -> Self {
        Self {
            code: output.status.code().expect("the command ends by itself"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The JSON document on stdout.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}\n{}{}", self.stdout, self.stderr))
    }
}

/// The command, to be started by the caller.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slimllm"));
    command.args(args);
    command
}

/// Runs the command, whatever it answers.
pub fn slimllm(args: &[&str]) -> Answer {
    Answer::new(command(args).output().unwrap())
}

/// Runs the command, which must succeed.
pub fn succeed(args: &[&str]) -> Answer {
    let answer = slimllm(args);
    assert_eq!(answer.code, 0, "{args:?}\n{}{}", answer.stdout, answer.stderr);
    answer
}

/// Runs the command, which must fail with exit code 2 and a message that has all `fragments`.
pub fn fail(args: &[&str], fragments: &[&str]) {
    let answer = slimllm(args);
    assert_eq!(answer.code, 2, "{args:?}\n{}{}", answer.stdout, answer.stderr);
    for fragment in fragments {
        assert!(
            answer.stderr.contains(fragment),
            "{args:?}: no `{fragment}` in\n{}",
            answer.stderr
        );
    }
    assert_eq!(answer.stdout, "", "{args:?}: talk belongs on stderr");
}

/// A tiny model of the repository.
pub fn tiny_model(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/archs").join(name);
    path.to_str().unwrap().to_owned()
}
