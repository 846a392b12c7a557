//! ONNX models: the weights of an exported `llama` or `mistral` model, described by the
//! `config.json` beside it.
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
    Result, TokenizerSource, Weight,
    arch::Tensor,
    folder::{Description, Folder},
};
pub use every_tensor::check_external_data;

use external::ExternalFiles;
use graph::{Data, Graph, Initializer};
use modules::Modules;
use weights::{Place, find_weights};

/// A `llama` or `mistral` model in an ONNX file.
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
    /// Opens an `.onnx` file with the `config.json` and the tokenizer beside it.
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
        let mut folder = Folder::around(path);
        let Description { mut config, tokenizer, chat_template } = folder.description()?;
        let model = MappedFile::open(path)?;
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
        Ok(Self {
            decoder: Decoder::new(&config),
            config,
            external: external.into_maps(),
            tensors,
            by_name,
            tokenizer,
            chat_template,
            descriptions: folder.into_read(),
            model,
        })
    }
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
        let all_bytes = place.total_rows * cols * value_bytes;
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
        let (first, values, layout) = match place.rows_first {
            true => (place.first_row * cols, rows * cols, Layout::AsStored),
            false => {
                let stride = place.total_rows;
                (place.first_row, (cols - 1) * stride + rows, Layout::Transposed { stride })
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
        let StoredTensor { file, ref range, dtype, rows, cols, layout } = self.tensors[index].1;
        let file = file.map_or(&self.model, |file| &self.external[file]);
        let bytes = &file[range.clone()];
        Ok(Some(Weight::Dense(DenseTensor { dtype, rows, cols, bytes, layout })))
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

    fn release_pages(&self) {
        std::iter::once(&self.model).chain(&self.external).for_each(MappedFile::release_pages);
    }
}
