//! What a fuzzer does with its input: one function for each kind of file that others write.
//!
//! Each answers `None` for what is refused, and a digest of all that was read otherwise. None may
//! panic, hang, or allocate much more than its input has. `tests/fuzz` runs the same functions on
//! stable Rust.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use slim_formats::{
    Limits, ModelSource, TokenizerSource, Weight, gguf::GgufHeader, open_model, slim::SlimFile,
};
use slim_runtime::{Chat, ChatTemplate, Message, Tokenizer};

/// A kind of file that others write.
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// What is done with an input, which may be written to a folder.
    pub read: fn(&[u8], &Folder) -> Option<u64>,
    /// A sound input, below `tests/data`.
    pub seed: &'static str,
    /// Files that stand beside the input, there.
    pub beside: &'static [&'static str],
}

const CONFIG: &str = "fuzz/folder/config.json";
const TOKENIZER: &str = "fuzz/folder/tokenizer.json";
const WEIGHTS: &str = "fuzz/folder/model.safetensors";

/// All of them.
pub const TARGETS: [Target; 9] = [
    Target { name: "slim", read: slim, seed: "fuzz/model.slim.gguf", beside: &[] },
    Target { name: "gguf", read: gguf, seed: "fuzz/model.gguf", beside: &[] },
    Target { name: "safetensors", read: safetensors, seed: WEIGHTS, beside: &[CONFIG, TOKENIZER] },
    Target {
        name: "safetensors_index",
        read: safetensors_index,
        seed: "fuzz/folder/model.safetensors.index.json",
        beside: &[CONFIG, TOKENIZER, "fuzz/folder/weights.safetensors"],
    },
    Target {
        name: "onnx",
        read: onnx,
        seed: "onnx/dynamo/model.onnx",
        beside: &[
            "archs/llama/config.json",
            "archs/llama/tokenizer.json",
            "onnx/dynamo/model.onnx.data",
        ],
    },
    Target { name: "config", read: config, seed: CONFIG, beside: &[WEIGHTS, TOKENIZER] },
    Target { name: "tokenizer", read: tokenizer, seed: TOKENIZER, beside: &[] },
    Target { name: "gguf_tokenizer", read: gguf_tokenizer, seed: "fuzz/model.gguf", beside: &[] },
    Target {
        name: "chat_template",
        read: chat_template,
        seed: "fuzz/folder/chat_template.jinja",
        beside: &[],
    },
];

/// A folder of the fuzzer, with the sound files that stand beside its input.
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// One at `root` for a target, whose files lie below `data`.
    pub fn new(root: &Path, target: &Target, data: &Path) -> Self {
        for file in target.beside {
            let path = data.join(file);
            let name = path.file_name().expect("a file has a name");
            fs::copy(&path, root.join(name)).expect("the fuzzer has a folder");
        }
        Self { root: root.to_owned() }
    }

    /// Writes the input under a name.
    fn with(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.root.join(name);
        fs::write(&path, data).expect("the fuzzer has a folder");
        path
    }
}

/// A SliM file: opened, verified, every tensor read.
pub fn slim(data: &[u8], folder: &Folder) -> Option<u64> {
    let file = SlimFile::open(&folder.with("input.slim.gguf", data)).ok()?;
    file.verify();
    weights(&file)
}

/// Any other GGUF file.
pub fn gguf(data: &[u8], folder: &Folder) -> Option<u64> {
    weights(&*open_model(&folder.with("input.gguf", data)).ok()?)
}

/// The weights of a Hugging Face folder.
pub fn safetensors(data: &[u8], folder: &Folder) -> Option<u64> {
    folder.with("model.safetensors", data);
    weights(&*open_model(&folder.root).ok()?)
}

/// The index of a Hugging Face folder, whose weights are `weights.safetensors`.
pub fn safetensors_index(data: &[u8], folder: &Folder) -> Option<u64> {
    folder.with("model.safetensors.index.json", data);
    weights(&*open_model(&folder.root).ok()?)
}

/// An ONNX graph, with its external data beside it.
pub fn onnx(data: &[u8], folder: &Folder) -> Option<u64> {
    weights(&*open_model(&folder.with("model.onnx", data)).ok()?)
}

/// The `config.json` of a Hugging Face folder.
pub fn config(data: &[u8], folder: &Folder) -> Option<u64> {
    folder.with("config.json", data);
    weights(&*open_model(&folder.root).ok()?)
}

/// A `tokenizer.json`.
pub fn tokenizer(data: &[u8], _: &Folder) -> Option<u64> {
    let json = String::from_utf8(data.to_vec()).ok()?;
    texts(&TokenizerSource::HuggingFace(json))
}

/// The tokenizer of a GGUF file.
pub fn gguf_tokenizer(data: &[u8], _: &Folder) -> Option<u64> {
    let path = Path::new("input.gguf");
    let header = GgufHeader::parse(path, data, data.len() as u64, &Limits::default()).ok()?;
    texts(&TokenizerSource::from_gguf(header.metadata()))
}

/// A chat template, rendered in this process.
pub fn chat_template(data: &[u8], _: &Folder) -> Option<u64> {
    let source = std::str::from_utf8(data).ok()?;
    let messages =
        [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "")];
    let messages = messages.map(|(role, content)| Message::new(role, content));
    let chats = [Chat::new(&messages, true), Chat::new(&messages[1..3], false)];
    let rendered = ChatTemplate::new(source, "<s>", "</s>").render_all(&chats).ok()?;
    digest(rendered.into_iter().map(Result::ok).collect::<Vec<_>>())
}

/// All weights of a model, with their names.
fn weights(source: &dyn ModelSource) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    for name in source.tensor_names() {
        name.hash(&mut hasher);
        match source.tensor(name).ok()?? {
            Weight::Dense(dense) => (dense.rows, dense.cols, dense.bytes).hash(&mut hasher),
            weight => {
                for (first_row, layer) in weight.bands()?.iter() {
                    (first_row, layer.parts()).hash(&mut hasher);
                }
            }
        }
    }
    Some(hasher.finish())
}

/// What a tokenizer makes of a few texts.
fn texts(source: &TokenizerSource) -> Option<u64> {
    let tokenizer = Tokenizer::new(source).ok()?;
    let texts = ["", "The quick brown fox\n\t jumps.", "né 漢字 \u{1f600} <s></s>"];
    let tokens: Vec<_> = texts.iter().map(|text| tokenizer.encode_document(text).ok()).collect();
    let back: Vec<_> = tokens.iter().flatten().map(|ids| tokenizer.decode(ids).ok()).collect();
    digest((tokens, back))
}

fn digest(value: impl Hash) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    Some(hasher.finish())
}
