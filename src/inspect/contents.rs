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

use super::total_bytes;
use crate::open::is_slim;

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
    /// For SliM files.
    slim: Option<SlimFile>,
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
    /// Whether `bits_per_weight` counts it: a linear layer of a block, quantized if this is a SliM file.
    pub is_counted: bool,
}

impl Contents {
    /// Reads a file or a directory; of SliM files the structure only, not the hashes.
    pub fn read(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            // Without a `config.json` beside it, or of another architecture, it is still a list of tensors.
            return Self::of_model(path).or_else(|_| Self::of_safetensors(path));
        }
        if path.is_dir() || !MappedFile::open(path)?.starts_with(&gguf::MAGIC) {
            return Self::of_model(path);
        }
        match is_slim(path) {
            true => Self::of_slim(SlimFile::open_without_hashes(path)?),
            false => Ok(Self::of_gguf(&GgufFile::open(path)?)),
        }
    }

    fn of_model(path: &Path) -> Result<Self> {
        let source = open_model(path)?;
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
            slim: None,
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
            slim: None,
        })
    }

    fn of_gguf(file: &GgufFile) -> Self {
        let tensors: Vec<Tensor> = file.tensors().iter().map(Tensor::of_gguf).collect();
        Self {
            format: "gguf",
            architecture: file.metadata().str("general.architecture").map(str::to_owned),
            file_bytes: file.file_bytes().len() as u64,
            weights: tensors.iter().map(WeightSize::of_tensor).collect(),
            tensors,
            metadata: file.metadata().clone(),
            slim: None,
        }
    }

    fn of_slim(file: SlimFile) -> Result<Self> {
        let mut weights = Vec::new();
        for name in file.tensor_names() {
            if let Some(found) = file.tensor(name)? {
                weights.push(WeightSize::of_slim(name, found));
            }
        }
        let gguf = Self::of_gguf(file.gguf());
        Ok(Self { format: "slim", weights, slim: Some(file), ..gguf })
    }

    /// The layer table of a SliM file, empty for others.
    pub fn layers(&self) -> &[LayerInfo] {
        self.slim.as_ref().map_or(&[], SlimFile::layers)
    }

    /// The broken rules that opening the file did not find.
    pub fn verify(&self) -> Vec<Fault> {
        self.slim.as_ref().map_or_else(Vec::new, SlimFile::verify)
    }

    pub fn parameters(&self) -> u64 {
        self.weights.iter().map(|weight| weight.elements).sum()
    }

    /// Bits per weight of the (quantized) linear layers of the blocks, everything counted.
    pub fn bits_per_weight(&self) -> Option<f64> {
        let counted = self.weights.iter().filter(|weight| weight.is_counted);
        let (bits, elements) = counted.fold((0, 0), |(bits, elements), weight| {
            (bits + weight.bits, elements + weight.elements)
        });
        (elements > 0).then(|| bits as f64 / elements as f64)
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
            is_counted: tensor.shape.len() > 1 && tensor.name.starts_with("blk."),
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
            is_counted: is_layer && name.starts_with("blk."),
        }
    }

    pub fn bits_per_weight(&self) -> f64 {
        self.bits as f64 / self.elements as f64
    }
}

fn type_name(dtype: DType) -> String {
    match dtype {
        DType::Unknown(id) => format!("unknown type {id}"),
        known => format!("{known:?}"),
    }
}
