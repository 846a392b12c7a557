//! The weights of a model in the layouts of other engines.
//!
//! [`export`] writes any [`ModelSource`] in the layout of a [`Target`] and tells in a [`Report`]
//! what the layout costs. What each layout holds is told in `docs/export.md`.

mod error;
mod folder;
mod gguf;
mod gptq;
mod onnx;
mod rows;
mod safetensors;
mod tensor;
#[cfg(test)]
mod tests;

use slim_formats::{ModelSource, OutputPath};

pub use error::{ExportError, Result};

/// A layout that other engines read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A llama.cpp file.
    Gguf,
    /// A Hugging Face folder with layers as GPTQ packs them.
    Gptq,
    /// A folder that ONNX Runtime and ONNX Runtime GenAI run.
    Onnx,
    /// A Hugging Face folder in fp16.
    Safetensors,
}

impl Target {
    /// What a model computes that the engines of this layout do not, as the subject of "... cannot
    /// be exported"; `None` if they can run it.
    pub fn lacks(self, model: &dyn ModelSource) -> Option<String> {
        match self {
            Self::Gguf => gguf::lacks(model),
            Self::Onnx => onnx::lacks(model.decoder()),
            Self::Gptq => gptq::lacks(model.decoder()),
            Self::Safetensors => safetensors::lacks(model.decoder()),
        }
    }

    /// Who reads the layout, as the end of "... cannot be exported to".
    fn engine(self) -> &'static str {
        match self {
            Self::Gguf => "llama.cpp",
            Self::Gptq => "the GPTQ layout",
            Self::Onnx => "ONNX Runtime",
            Self::Safetensors => "transformers",
        }
    }
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Report {
    /// Tensors of the model, those of its configuration and tokenizer left out.
    pub tensors: usize,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// What the layout costs each matrix, in the order in which they were written.
    pub layers: Vec<LayerLoss>,
    /// What the layout cannot say about the model.
    pub warnings: Vec<String>,
}

/// What a layout costs one matrix.
#[derive(Debug, Clone)]
pub struct LayerLoss {
    /// The GGUF name.
    pub name: String,
    /// The name of the layout: `Q4_1`, `F16`, `GPTQ 4-bit`.
    pub layout: &'static str,
    /// `||W' - W|| / ||W||` of the weights as written and as the model has them.
    pub error: f64,
}

/// Writes `model` in the layout of `target` to `output`: a file for [`Target::Gguf`], for the
/// others a folder. It appears whole or not at all. `on_tensor` is told each tensor before it is
/// written.
///
/// # Errors
/// `Unsupported` and `Unrepresentable` for what the layout cannot hold, and what reading and
/// writing may fail with.
pub fn export<'p>(
    model: &dyn ModelSource,
    target: Target,
    output: impl Into<OutputPath<'p>>,
    on_tensor: &mut dyn FnMut(&str),
) -> Result<Report> {
    let output = output.into();
    let on_tensor = &mut |name: &str| {
        model.release_pages();
        on_tensor(name);
    };
    if let Some(what) = target.lacks(model) {
        let hint = match target {
            Target::Safetensors => "use `--to gguf`",
            _ => "use `--to safetensors`",
        };
        return Err(ExportError::unsupported(model.path(), target.engine(), what, hint));
    }
    match target {
        Target::Gguf => gguf::write(model, output, on_tensor),
        Target::Gptq => gptq::write(model, output, on_tensor),
        Target::Onnx => onnx::write(model, output, on_tensor),
        Target::Safetensors => safetensors::write(model, output, on_tensor),
    }
}
