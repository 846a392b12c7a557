//! Any supported file, in the same terms.

use std::path::Path;

use safetensors::SafeTensors;
use slim_formats::{
    DType, FormatError, MappedFile, ModelSource, Result, Weight,
    gguf::{self, GgufFile, Metadata, TensorInfo},
    open_model,
    slim::{Fault, LayerInfo, SlimFile},
};
use slim_kernels::weight;

use super::{total_bytes, verify};
use crate::{
    open::{is_slim, warn_of},
    output::{note, sha256},
};

/// What a file holds.
pub struct Contents {
    /// As [`ModelSource::format`] names it.
    pub format: &'static str,
    /// GGUF's name of the architecture, if the file tells.
    pub architecture: Option<String>,
    pub file_bytes: u64,
    /// The tensors as the file lists them.
    pub tensors: Vec<Tensor>,
    /// The weights of the model: the tensors, but a SliM layer is one weight of several tensors.
    pub weights: Vec<WeightSize>,
    pub metadata: Metadata,
    opened: Opened,
}

/// What the contents are of.
enum Opened {
    Slim(Box<SlimFile>),
    Gguf(GgufFile),
    Safetensors(MappedFile),
    Model(Box<dyn ModelSource>),
}

/// A tensor as its file lists it.
pub struct Tensor {
    pub name: String,
    /// As ggml spells it.
    pub dtype: String,
    /// Outermost first.
    pub shape: Vec<u64>,
    pub bytes: u64,
}

/// What a weight takes.
pub struct WeightSize {
    pub name: String,
    /// Its element type, or that it is a SliM layer.
    pub kind: String,
    pub elements: u64,
    /// Everything counted.
    pub bits: u64,
    /// Whether it is a linear layer of a block.
    pub is_linear: bool,
    /// Whether it is dense in a SliM file.
    pub is_kept: bool,
}

impl Contents {
    /// Reads a file or a directory; of SliM files the structure only, not the hashes.
    pub fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            // Without a `config.json` beside it, or of another architecture, it is still a list of
            // tensors.
            return match Self::of_model(path) {
                Err(error) if !matches!(error, FormatError::Malformed { .. }) => {
                    let contents = Self::of_safetensors(path)?;
                    note(format_args!("read as a list of tensors, not as a model: {error}"));
                    Ok(contents)
                }
                contents => contents,
            };
        }
        if path.is_dir() || !MappedFile::open(path)?.starts_with(&gguf::MAGIC) {
            return Self::of_model(path);
        }
        match is_slim(path) {
            true => Self::of_slim(SlimFile::open_without_hashes(path)?),
            false => Ok(Self::of_gguf(GgufFile::open(path)?)),
        }
    }

    fn of_model(path: &Path) -> Result<Self> {
        let source = open_model(path)?;
        warn_of(&*source);
        let mut tensors = Vec::new();
        for name in source.tensor_names() {
            if let Some(Weight::Dense(dense)) = source.tensor(name)? {
                let dims =
                    if dense.rows == 1 { vec![dense.cols] } else { vec![dense.rows, dense.cols] };
                tensors.push(Tensor {
                    name: name.to_owned(),
                    dtype: type_name(dense.dtype),
                    shape: dims.into_iter().map(|dim| dim as u64).collect(),
                    bytes: dense.stored_bytes(),
                });
            }
        }
        Ok(Self {
            format: source.format(),
            architecture: Some(source.decoder().family.architecture().to_owned()),
            file_bytes: total_bytes(&source.files())?,
            weights: tensors.iter().map(WeightSize::of_tensor).collect(),
            tensors,
            metadata: source.config().to_gguf(),
            opened: Opened::Model(source),
        })
    }

    fn of_safetensors(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let (_, header) = SafeTensors::read_metadata(&file).map_err(|error| {
            FormatError::malformed(path, "the header", "", error, "a safetensors header")
        })?;
        let mut tensors: Vec<Tensor> = header
            .tensors()
            .into_iter()
            .map(|(name, info)| Tensor {
                name,
                dtype: format!("{:?}", info.dtype),
                shape: info.shape.iter().map(|&dim| dim as u64).collect(),
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let mut metadata = Metadata::new();
        for (key, value) in header.metadata().iter().flatten() {
            metadata.insert(key, value.as_str())?;
        }
        Ok(Self {
            format: "safetensors",
            architecture: None,
            file_bytes: file.len() as u64,
            weights: tensors.iter().map(WeightSize::of_tensor).collect(),
            tensors,
            metadata,
            opened: Opened::Safetensors(file),
        })
    }

    fn of_gguf(file: GgufFile) -> Self {
        let tensors: Vec<Tensor> = file.tensors().iter().map(Tensor::of_gguf).collect();
        Self {
            format: "gguf",
            architecture: file.metadata().str("general.architecture").map(str::to_owned),
            file_bytes: file.total_bytes(),
            weights: tensors.iter().map(WeightSize::of_tensor).collect(),
            tensors,
            metadata: file.metadata().clone(),
            opened: Opened::Gguf(file),
        }
    }

    fn of_slim(file: SlimFile) -> Result<Self> {
        let mut weights = Vec::new();
        for name in file.tensor_names() {
            if let Some(found) = file.tensor(name)? {
                weights.push(WeightSize::of_slim(name, found));
            }
        }
        let gguf = file.gguf();
        Ok(Self {
            format: "slim",
            architecture: gguf.metadata().str("general.architecture").map(str::to_owned),
            file_bytes: gguf.file_bytes().len() as u64,
            tensors: gguf.tensors().iter().map(Tensor::of_gguf).collect(),
            weights,
            metadata: gguf.metadata().clone(),
            opened: Opened::Slim(Box::new(file)),
        })
    }

    /// The layer table of a SliM file, empty for others.
    pub fn layers(&self) -> &[LayerInfo] {
        match &self.opened {
            Opened::Slim(file) => file.layers(),
            Opened::Gguf(_) | Opened::Safetensors(_) | Opened::Model(_) => &[],
        }
    }

    /// The broken rules that opening the file did not find.
    pub fn verify(&self) -> Result<Vec<Fault>> {
        match &self.opened {
            Opened::Slim(file) => Ok(file.verify()),
            Opened::Gguf(file) => Ok(verify::gguf_faults(file)),
            Opened::Safetensors(file) => verify::safetensors_faults(file),
            Opened::Model(source) => verify::model_faults(&**source),
        }
    }

    /// SHA-256 of the chat template: it decides what a model is told, and files of one model that
    /// differ in it behave differently.
    pub fn template_sha256(&self) -> Option<String> {
        let template = match &self.opened {
            Opened::Model(source) => source.chat_template(),
            _ => self.metadata.str("tokenizer.chat_template"),
        };
        template.map(|template| sha256(template.as_bytes()))
    }

    pub fn parameters(&self) -> u64 {
        self.weights.iter().map(|weight| weight.elements).sum()
    }

    /// The linear layers of the blocks.
    pub fn linear_layers(&self) -> impl Iterator<Item = &WeightSize> + Clone {
        self.weights.iter().filter(|weight| weight.is_linear)
    }

    /// Those of them that are not kept dense in a SliM file.
    pub fn quantized_layers(&self) -> impl Iterator<Item = &WeightSize> + Clone {
        self.linear_layers().filter(|weight| !weight.is_kept)
    }

    /// The weight of this name.
    pub fn weight(&self, name: &str) -> Option<&WeightSize> {
        self.weights.iter().find(|weight| weight.name == name)
    }
}

impl Tensor {
    fn of_gguf(info: &TensorInfo) -> Self {
        Self {
            name: info.name.clone(),
            dtype: type_name(info.dtype),
            shape: info.shape.clone(),
            bytes: info.bytes,
        }
    }
}

impl WeightSize {
    fn of_tensor(tensor: &Tensor) -> Self {
        Self {
            name: tensor.name.clone(),
            kind: tensor.dtype.clone(),
            elements: tensor.shape.iter().product(),
            bits: 8 * tensor.bytes,
            is_linear: tensor.shape.len() > 1 && tensor.name.starts_with("blk."),
            is_kept: false,
        }
    }

    fn of_slim(name: &str, found: Weight<'_>) -> Self {
        let (rows, cols) = weight::shape(found);
        let (kind, is_layer) = match found {
            Weight::Dense(dense) => (type_name(dense.dtype), false),
            Weight::Packed(_) => ("SliM layer".to_owned(), true),
            Weight::Bands(_) => ("SliM layers".to_owned(), true),
        };
        Self {
            name: name.to_owned(),
            kind,
            elements: (rows * cols) as u64,
            bits: 8 * weight::stored_bytes(found),
            is_linear: (is_layer || rows > 1) && name.starts_with("blk."),
            is_kept: !is_layer,
        }
    }

    pub fn bits_per_weight(&self) -> f64 {
        self.bits as f64 / self.elements as f64
    }
}

/// Bits per weight of some weights, everything counted; `None` of none.
pub fn bits_per_weight<'a>(weights: impl Iterator<Item = &'a WeightSize>) -> Option<f64> {
    let (bits, elements) = weights
        .fold((0, 0), |(bits, elements), weight| (bits + weight.bits, elements + weight.elements));
    (elements > 0).then(|| bits as f64 / elements as f64)
}

fn type_name(dtype: DType) -> String {
    match dtype {
        DType::Unknown(id) => format!("unknown type {id}"),
        known => format!("{known:?}"),
    }
}
