//! ONNX models: the weights of an exported model, described by the `config.json` beside it.
//!
//! The graph is not executed, and that it computes what `config.json` describes is not checked. It
//! is asked only which of its initializers is which weight, and how it lies. Weights are served
//! from the memory maps of the model file and of its external data; transposed and fused ones, too
//! ([`Layout::Transposed`]).

mod every_tensor;
mod external;
mod graph;
mod modules;
mod weights;
mod wire;

#[cfg(test)]
mod encode;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
};

use crate::{
    DType, Decoder, DenseTensor, FormatError, Layout, Limits, MappedFile, ModelConfig, ModelSource,
    Part, Result, TokenizerSource, Weight,
    arch::Tensor,
    folder::{Description, Folder},
    stand_in,
};
pub use every_tensor::check_external_data;

use external::ExternalFiles;
use graph::{Data, Graph, Initializer};
use modules::Modules;
use weights::{Place, find_weights};

/// A model in an ONNX file.
#[derive(Debug)]
pub struct OnnxModel {
    config: ModelConfig,
    decoder: Decoder,
    model: MappedFile,
    external: Vec<MappedFile>,
    /// GGUF name and place of each tensor, in the order of use.
    tensors: Vec<(String, StoredTensor)>,
    by_name: HashMap<String, usize>,
    tokenizer: TokenizerSource,
    chat_template: Option<String>,
    /// Those beside the model.
    descriptions: Vec<PathBuf>,
    warnings: Vec<String>,
}

/// Where a tensor lies and how to read it.
#[derive(Debug)]
struct StoredTensor {
    /// Index of the file with external data; `None` for the model itself.
    file: Option<usize>,
    range: Range<usize>,
    dtype: DType,
    /// 1 for a vector.
    rows: usize,
    cols: usize,
    layout: Layout,
}

impl OnnxModel {
    /// Opens an `.onnx` file with the `config.json` and the tokenizer beside it or, if its folder
    /// is called `onnx`, in the folder above.
    ///
    /// Read are exports of `torch.onnx` (by TorchScript or by dynamo, so those of Optimum, too) and
    /// models of the ONNX Runtime GenAI builder, with weights in F16, BF16 or F32, in the file or
    /// beside it in regular files that no link leads to.
    ///
    /// # Errors
    /// `Io`, `Malformed` if a file contradicts its format or the others, `Unsupported` if the model
    /// needs what this program does not compute, is quantized, or has weights that are not
    /// recognised.
    pub fn open(path: &Path) -> Result<Self> {
        let model = MappedFile::open(path)?;
        stand_in::refuse(path, &model, "an ONNX model")?;
        let mut folder = Folder::around_onnx(path);
        let Description {
            mut config, tokenizer, chat_template, quantization, mut warnings, ..
        } = folder.description()?;
        if let Some(method) = quantization {
            warnings.push(format!(
                "`{}`: `quantization_config` ({method}) is not borne out by the graph, which counts",
                folder.config_path().display()
            ));
        }
        if config.features.recurrence.is_some() || config.features.latent.is_some() {
            let what = format!("an ONNX file of a `{}` model", config.family.architecture());
            return Err(FormatError::unsupported(path, what, "use its Hugging Face directory"));
        }
        let is_said_tied = config.tied_embeddings;
        let mut external = ExternalFiles::new(path, folder.root())?;
        let modules = Modules::new(&config);
        let limits = Limits::default();
        let graph = Graph::read(path, &model, &limits)?;
        let mut tensors = Vec::with_capacity(modules.slots.len());
        for (slot, place) in find_weights(path, &graph, &modules, &mut config)? {
            let (slot, initializer) =
                (&modules.slots[slot], &graph.initializers[place.initializer]);
            let stored = StoredTensor::new(path, slot, place, initializer, &mut external)?;
            tensors.push((slot.name.clone(), stored));
        }
        let by_name = tensors.iter().map(|(name, _)| name.clone()).zip(0..).collect();
        let config_path = folder.config_path().to_owned();
        let mut model = Self {
            decoder: Decoder::new(&config),
            config,
            external: external.into_maps(),
            tensors,
            by_name,
            tokenizer,
            chat_template,
            descriptions: folder.into_read(),
            warnings,
            model,
        };
        model.settle_output(is_said_tied, &config_path);
        Ok(model)
    }

    /// Leaves out an output projection that is the embedding, perhaps transposed, and says where
    /// `tie_word_embeddings` is wrong about it.
    fn settle_output(&mut self, is_said_tied: bool, config_path: &Path) {
        let output = self.by_name.get(&*Part::Output.gguf_name()).copied();
        let is_embedding = |&output: &usize| {
            let embedding = self.by_name.get(&*Part::Embedding.gguf_name());
            embedding.is_some_and(|&embedding| {
                has_same_values(&self.dense(embedding), &self.dense(output))
            })
        };
        if let Some(output) = output.filter(|_| is_said_tied).filter(is_embedding) {
            self.tensors.remove(output);
            self.by_name = self.tensors.iter().map(|(name, _)| name.clone()).zip(0..).collect();
        }
        self.config.tied_embeddings = !self.by_name.contains_key(&*Part::Output.gguf_name());
        self.decoder = Decoder::new(&self.config);
        let found = match (is_said_tied, self.config.tied_embeddings) {
            (true, false) => "true, but the graph has another matrix for the output, which is used",
            (false, true) => {
                "false, but the graph uses the embedding for the output, and so is it here"
            }
            _ => return,
        };
        let path = config_path.display();
        self.warnings.push(format!("`{path}`: `tie_word_embeddings` is {found}"));
    }

    fn dense(&self, index: usize) -> DenseTensor<'_> {
        let StoredTensor { file, ref range, dtype, rows, cols, layout } = self.tensors[index].1;
        let file = file.map_or(&self.model, |file| &self.external[file]);
        DenseTensor { dtype, rows, cols, bytes: &file[range.clone()], layout, scales: None }
    }
}

/// Whether two matrices of a plain type are the same, however they lie.
fn has_same_values(a: &DenseTensor<'_>, b: &DenseTensor<'_>) -> bool {
    // Small enough for a cache, in whichever direction the values lie.
    const TILE: usize = 64;
    let value_bytes = a.dtype.size_in_bytes(1).unwrap_or_default() as usize;
    let value = |tensor: &DenseTensor<'_>, row: usize, col: usize| {
        let index = match tensor.layout {
            Layout::Transposed { stride, step } => col * stride + row * step,
            _ => row * tensor.cols + col,
        };
        index * value_bytes..(index + 1) * value_bytes
    };
    (a.dtype, a.rows, a.cols) == (b.dtype, b.rows, b.cols)
        && (0..a.rows).step_by(TILE).all(|row| {
            (0..a.cols).step_by(TILE).all(|col| {
                (row..a.rows.min(row + TILE)).all(|row| {
                    (col..a.cols.min(col + TILE))
                        .all(|col| a.bytes[value(a, row, col)] == b.bytes[value(b, row, col)])
                })
            })
        })
}

impl StoredTensor {
    /// The values of a slot at its place, which has the right shape.
    fn new(
        path: &Path,
        slot: &Tensor,
        place: Place,
        initializer: &Initializer<'_>,
        external: &mut ExternalFiles,
    ) -> Result<Self> {
        let name = initializer.name;
        let unsupported = |what: String, hint: &str| {
            Err(FormatError::unsupported(path, format!("initializer `{name}`: {what}"), hint))
        };
        let Some(dtype) = initializer.dtype() else {
            let what = format!("element type {}", initializer.data_type);
            return unsupported(what, "weights must be FLOAT (1), FLOAT16 (10) or BFLOAT16 (16)");
        };
        let (rows, cols) = slot.shape();
        // The configuration's limits keep the products far below 2^64.
        let value_bytes = dtype.size_in_bytes(1).unwrap_or_default() as usize;
        let row = if slot.is_matrix() { cols } else { 1 };
        let all_bytes = place.total_rows * row * value_bytes;
        let (file, all) = match &initializer.data {
            Data::Inline(range) if range.len() == all_bytes => (None, range.clone()),
            Data::Inline(range) => {
                let found = format!("{} bytes", range.len());
                let expected = format!("{all_bytes} for {:?} {dtype:?}", initializer.dims);
                let place = format!("initializer `{name}`");
                return Err(FormatError::malformed(path, place, "", found, expected));
            }
            Data::External(data) => {
                let (file, range) = external.find(name, data, all_bytes as u64)?;
                (Some(file), range)
            }
            Data::Other(form) => {
                return unsupported(form.to_string(), "save the model with raw or external data");
            }
        };
        let (first, values, layout) = match (place.rows_first, slot.hf.layout) {
            (true, order) => (place.first_row * row, rows * cols, order),
            (false, Layout::AsStored) => {
                let stride = place.total_rows;
                let layout = Layout::Transposed { stride, step: 1 };
                (place.first_row, (cols - 1) * stride + rows, layout)
            }
            (false, _) => {
                let what = "a transposed weight whose rows stand in the order of neighbours";
                return unsupported(what.into(), "use the model's Hugging Face directory");
            }
        };
        let start = all.start + first * value_bytes;
        let range = start..start + values * value_bytes;
        Ok(Self { file, range, dtype, rows, cols, layout })
    }
}

impl ModelSource for OnnxModel {
    fn path(&self) -> &Path {
        self.model.path()
    }

    fn format(&self) -> &'static str {
        "onnx"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.tensors.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>> {
        let Some(&index) = self.by_name.get(name) else { return Ok(None) };
        Ok(Some(Weight::Dense(self.dense(index))))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    fn files(&self) -> Vec<PathBuf> {
        let weights = std::iter::once(&self.model).chain(&self.external);
        self.descriptions
            .iter()
            .cloned()
            .chain(weights.map(|file| file.path().to_owned()))
            .collect()
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn release_pages(&self) {
        std::iter::once(&self.model).chain(&self.external).for_each(MappedFile::release_pages);
    }
}
