use std::path::{Path, PathBuf};

use slim_formats::{
    Decoder, FormatError, ModelConfig, Result as FormatResult, TokenizerSource, Weight,
    arch::Mixer, open_model,
};

use super::*;
use crate::{ExportError, Target, export};

/// A tiny model of which one thing is not as it should be.
struct Changed {
    model: Box<dyn ModelSource>,
    config: ModelConfig,
    decoder: Decoder,
    missing: &'static str,
}

impl Changed {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs").join(name);
        let model = open_model(&path).unwrap();
        let (config, decoder) = (model.config().clone(), model.decoder().clone());
        Self { model, config, decoder, missing: "" }
    }
}

impl ModelSource for Changed {
    fn path(&self) -> &Path {
        self.model.path()
    }

    fn format(&self) -> &'static str {
        self.model.format()
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.model.tensor_names()
    }

    fn tensor(&self, name: &str) -> FormatResult<Option<Weight<'_>>> {
        if name == self.missing { Ok(None) } else { self.model.tensor(name) }
    }

    fn tokenizer(&self) -> &TokenizerSource {
        self.model.tokenizer()
    }

    fn chat_template(&self) -> Option<&str> {
        self.model.chat_template()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.model.files()
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn write_gives_a_whole_folder_and_tells_each_tensor_once() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("out");
    let archs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/archs");
    for entry in std::fs::read_dir(archs).unwrap() {
        let model = Changed::new(entry.unwrap().file_name().to_str().unwrap());
        if lacks(model.decoder()).is_some() {
            continue;
        }
        let mut told = Vec::new();
        let report =
            write(&model, (&folder).into(), &mut |tensor| told.push(tensor.to_owned())).unwrap();
        assert_eq!(
            names_in(&folder),
            [
                "config.json",
                "genai_config.json",
                "generation_config.json",
                "model.onnx",
                "model.onnx.data",
                "tokenizer.json",
                "tokenizer_config.json"
            ]
        );
        assert_eq!(names_in(parent.path()), ["out"]);
        let lengths = names_in(&folder)
            .iter()
            .map(|name| folder.join(name).metadata().unwrap().len())
            .sum::<u64>();
        assert_eq!(report.file_bytes, lengths);
        let mut expected = model.tensor_names();
        expected.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, expected);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn write_of_the_same_model_gives_the_same_bytes() {
    let parent = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| {
        let folder = parent.path().join(name);
        write(&Changed::new("llama"), (&folder).into(), &mut |_| {}).unwrap();
        ["model.onnx", "model.onnx.data"].map(|file| std::fs::read(folder.join(file)).unwrap())
    });
    assert!(first == second);
}

#[test]
fn write_that_fails_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("out");
    let model = Changed { missing: "blk.1.ffn_down.weight", ..Changed::new("llama") };
    let error = write(&model, (&folder).into(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("blk.1.ffn_down.weight"), "{error}");
    assert!(names_in(parent.path()).is_empty());
}

#[test]
fn write_over_a_folder_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    std::fs::write(parent.path().join("precious"), "kept").unwrap();
    let error = write(&Changed::new("llama"), parent.path().into(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, ExportError::Format(FormatError::Exists { .. })), "{error}");
    assert_eq!(names_in(parent.path()), ["precious"]);
}

#[test]
fn write_of_what_the_engine_cannot_run_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let mut model = Changed::new("llama");
    let Mixer::Attention(attention) = &mut model.decoder.blocks[1].mixer else { panic!() };
    attention.head_dim = 20;
    let folder = parent.path().join("out");
    let error = export(&model, Target::Onnx, &folder, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ExportError::Unsupported { .. }), "{error}");
    assert!(names_in(parent.path()).is_empty());
}
