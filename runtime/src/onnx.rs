//! ONNX graphs, run as they stand by ONNX Runtime: another implementation than ours, to compare
//! with.

use std::{
    error::Error,
    ops::Range,
    path::{Path, PathBuf},
};

use half::f16;
use ort::{
    LoadDynamicError,
    environment::Environment,
    logging::LogLevel,
    session::{Session, builder::SessionBuilder},
    value::{DynTensor, DynValue, Outlet, Tensor, TensorElementType, ValueType},
};
use slim_formats::onnx::check_external_data;

use crate::{
    Result, RuntimeError,
    perplexity::{Logits, NextTokens},
};

/// The library ONNX Runtime.
pub struct OnnxRuntime(Environment);

impl OnnxRuntime {
    /// Loads the library from a file, or, by a plain name, from where the system keeps libraries. A
    /// process can do so once.
    ///
    /// # Errors
    /// `OnnxLibrary` if there is none, or one before version 1.24.
    pub fn load(library: &Path) -> Result<Self> {
        let cannot = |reason| RuntimeError::OnnxLibrary { library: library.to_owned(), reason };
        let environment = ort::init_from(library).map_err(|error| cannot(reason(error)))?;
        let environment = environment.with_telemetry(false).build();
        let environment = environment.map_err(|error| cannot(error.to_string()))?;
        // What goes wrong comes back as an error; it would be printed besides.
        environment.set_log_level(LogLevel::Fatal);
        Ok(Self(environment))
    }

    /// Opens an `.onnx` file, once every file that it names for its tensors has been found to be
    /// one of its own.
    ///
    /// # Errors
    /// As [`check_external_data`]; `OnnxGraph` if ONNX Runtime cannot load the graph,
    /// `InvalidArgument` if it gives no logits.
    pub fn open(&self, path: &Path) -> Result<OnnxGraph> {
        check_external_data(path)?;
        let load = || -> ort::Result<Session> {
            SessionBuilder::new(&self.0)?
                .with_log_level(LogLevel::Fatal)?
                .with_intra_threads(rayon::current_num_threads())?
                .commit_from_file(path)
        };
        let session = load().map_err(|error| cannot(path, "load the graph", error))?;
        if !session.outputs().iter().any(|output| output.name() == LOGITS) {
            let name = |output: &Outlet| format!("`{}`", output.name());
            let names: Vec<_> = session.outputs().iter().map(name).collect();
            let what = format!("`{}`: outputs of the graph", path.display());
            let expected = format!("`{LOGITS}` among them");
            return Err(RuntimeError::invalid_argument(what, names.join(", "), expected));
        }
        Ok(OnnxGraph { path: path.to_owned(), session })
    }
}

/// The output that is compared.
const LOGITS: &str = "logits";

/// A language model's graph, which takes `input_ids` and gives `logits`.
///
/// It may take `attention_mask`, `position_ids` and `past_key_values.*`, too; the cache is empty.
pub struct OnnxGraph {
    path: PathBuf,
    session: Session,
}

impl NextTokens for OnnxGraph {
    fn run(&mut self, window: &[u32]) -> Result<Logits<'_>> {
        let path = &self.path;
        let inputs = self.session.inputs().iter().map(|input| {
            let value = self.input(input, window)?;
            Ok((input.name().to_owned(), value))
        });
        let inputs: Vec<_> = inputs.collect::<Result<_>>()?;
        let mut outputs =
            self.session.run(inputs).map_err(|error| cannot(path, "run the graph", error))?;
        let logits = outputs.remove(LOGITS).expect("`open` found it");
        let vocab = match logits.dtype() {
            ValueType::Tensor {
                ty: TensorElementType::Float32 | TensorElementType::Float16,
                shape,
                ..
            } if shape.len() == 3 && shape[..2] == [1, window.len() as i64] => shape[2] as usize,
            other => {
                let what = format!("`{}`: output `{LOGITS}`", path.display());
                let expected = format!("f32 or f16 [1, {}, vocabulary]", window.len());
                return Err(RuntimeError::invalid_argument(what, describe(other), expected));
            }
        };
        Ok(Box::new(move |positions| {
            floats(&logits, positions.start * vocab..positions.end * vocab)
                .map_err(|error| cannot(path, "give the logits", error))
        }))
    }
}

impl OnnxGraph {
    /// What to feed an input for a window that starts a text.
    fn input(&self, input: &Outlet, window: &[u32]) -> Result<DynTensor> {
        let tokens = window.len();
        let refuse = |expected: String| {
            let what = format!("`{}`: input `{}`", self.path.display(), input.name());
            Err(RuntimeError::invalid_argument(what, describe(input.dtype()), expected))
        };
        let cannot = |error| cannot(&self.path, "take an input", error);
        let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
            return refuse("a tensor".to_owned());
        };
        if input.name().starts_with("past_key_values.") {
            use TensorElementType::{Float16, Float32};
            return match (ty, &shape[..]) {
                (Float16 | Float32, &[-1 | 1, heads @ (1..), -1 | 0, head_dim @ (1..)]) => {
                    let empty = [1, heads, 0, head_dim];
                    DynTensor::new(self.session.allocator(), *ty, empty).map_err(cannot)
                }
                _ => refuse("f32 or f16 [?, heads, ?, head size]".to_owned()),
            };
        }
        let values: Vec<i64> = match input.name() {
            "input_ids" => window.iter().map(|&token| token.into()).collect(),
            "attention_mask" => vec![1; tokens],
            "position_ids" => (0..tokens as i64).collect(),
            other => {
                let what = format!("`{}`: an input of the graph", self.path.display());
                let found = format!("`{other}`");
                let known = "`input_ids`, `attention_mask`, `position_ids` or `past_key_values.*`";
                return Err(RuntimeError::invalid_argument(what, found, known));
            }
        };
        let fits = match shape[..] {
            [batch, length] => matches!(batch, -1 | 1) && (length == -1 || length == tokens as i64),
            _ => false,
        };
        if *ty != TensorElementType::Int64 || !fits {
            return refuse(format!("i64 [1, {tokens}], as the context has {tokens} tokens"));
        }
        let tensor = Tensor::from_array(([1, tokens], values)).map_err(cannot)?;
        Ok(tensor.upcast())
    }
}

/// The values `range` of a tensor of f32 or f16.
fn floats(tensor: &DynValue, range: Range<usize>) -> ort::Result<Vec<f32>> {
    match tensor.try_extract_tensor::<f32>() {
        Ok((_, values)) => Ok(values[range].to_vec()),
        Err(_) => {
            let (_, values) = tensor.try_extract_tensor::<f16>()?;
            Ok(values[range].iter().map(|value| value.to_f32()).collect())
        }
    }
}

/// A type as in `i64 [?, 16]`.
fn describe(dtype: &ValueType) -> String {
    match dtype {
        ValueType::Tensor { ty, shape, .. } => {
            let dim = |&dim: &i64| if dim < 0 { "?".to_owned() } else { dim.to_string() };
            format!("{ty} [{}]", shape.iter().map(dim).collect::<Vec<_>>().join(", "))
        }
        _ => "no tensor".to_owned(),
    }
}

fn cannot(path: &Path, action: &'static str, error: ort::Error) -> RuntimeError {
    RuntimeError::OnnxGraph { path: path.to_owned(), action, source: error.into() }
}

/// Why a library cannot be loaded, as a clause.
fn reason(error: LoadDynamicError) -> String {
    match error {
        LoadDynamicError::Dlopen { error, .. } => match error.source() {
            Some(answer) => answer.to_string(),
            None => error.to_string(),
        },
        LoadDynamicError::MissingApi { .. } | LoadDynamicError::InvalidVersionString => {
            "it is not ONNX Runtime".to_owned()
        }
        LoadDynamicError::BadVersion { version_str, .. } => {
            format!("found version {version_str}, expected 1.{} or later", ort::MINOR_VERSION)
        }
    }
}
