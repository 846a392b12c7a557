//! Any supported file, in the same terms.

use std::path::{Path, PathBuf};

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
    output::{note, one_line, sha256},
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
    Gguf(Box<GgufFile>),
    Safetensors(Vec<MappedFile>),
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
        let lists = safetensors_files(path);
        if !lists.is_empty() {
            // Without a `config.json` beside it, or of another architecture, it is still a list of
            // tensors.
            return match Self::of_model(path) {
                Err(error) if is_of_no_known_model(&error, path) => {
                    let contents = Self::of_safetensors(&lists)?;
                    let why = error.to_string();
                    note(format_args!(
                        "read as a list of tensors, not as a model: {}",
                        one_line(&why)
                    ));
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

    fn of_safetensors(paths: &[PathBuf]) -> Result<Self> {
        let (mut files, mut tensors, mut metadata) = (Vec::new(), Vec::new(), Metadata::new());
        for path in paths {
            let file = MappedFile::open(path)?;
            let (_, header) = SafeTensors::read_metadata(&file).map_err(|error| {
                FormatError::malformed(path, "the header", "", error, "a safetensors header")
            })?;
            tensors.extend(header.tensors().into_iter().map(|(name, info)| Tensor {
                name,
                dtype: format!("{:?}", info.dtype),
                shape: info.shape.iter().map(|&dim| dim as u64).collect(),
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            }));
            for (key, value) in header.metadata().iter().flatten() {
                // Parts of a model say the same.
                if metadata.get(key).is_none() {
                    metadata.insert(key, value.as_str())?;
                }
            }
            files.push(file);
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self {
            format: "safetensors",
            architecture: None,
            file_bytes: files.iter().map(|file| file.len() as u64).sum(),
            weights: tensors.iter().map(WeightSize::of_tensor).collect(),
            tensors,
            metadata,
            opened: Opened::Safetensors(files),
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
            opened: Opened::Gguf(Box::new(file)),
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
            file_bytes: gguf.total_bytes(),
            tensors: gguf.tensors().iter().map(Tensor::of_gguf).collect(),
            weights,
            metadata: gguf.metadata().clone(),
            opened: Opened::Slim(Box::new(file)),
        })
    }

    /// How many parts a GGUF or SliM file is in.
    pub fn parts(&self) -> usize {
        match &self.opened {
            Opened::Slim(file) => file.gguf().parts().count(),
            Opened::Gguf(file) => file.parts().count(),
            Opened::Safetensors(_) | Opened::Model(_) => 1,
        }
    }

    /// The layer table of a SliM file, empty for others.
    pub fn layers(&self) -> &[LayerInfo] {
        match &self.opened {
            Opened::Slim(file) => file.layers(),
            Opened::Gguf(_) | Opened::Safetensors(_) | Opened::Model(_) => &[],
        }
    }

    /// The least and the largest scale of a layer of a SliM file, zeros aside; `None` without any.
    pub fn scale_range(&self, layer: &str) -> Option<(f32, f32)> {
        let Opened::Slim(file) = &self.opened else { return None };
        let (layout, layer) = (file.layer(layer)?.layout(), file.layer(layer)?);
        let mut range = (f32::INFINITY, 0f32);
        for tile in 0..layout.tiles() {
            let (d, _) = layer.row_scales(tile);
            for group in layout.groups() {
                for run in 0..group.runs(layout.coding()).len() {
                    let (factor, _) = layer.scales(tile, group, run);
                    for scale in d.iter().zip(factor).map(|(d, s)| (d * s).abs()) {
                        if scale > 0.0 {
                            range = (range.0.min(scale), range.1.max(scale));
                        }
                    }
                }
            }
        }
        (range.1 > 0.0).then_some(range)
    }

    /// The broken rules that opening the file did not find.
    pub fn verify(&self) -> Result<Vec<Fault>> {
        match &self.opened {
            Opened::Slim(file) => Ok(file.verify()),
            Opened::Gguf(file) => Ok(verify::gguf_faults(file)),
            Opened::Safetensors(files) => files
                .iter()
                .map(verify::safetensors_faults)
                .collect::<Result<Vec<_>>>()
                .map(|of| of.concat()),
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

/// Whether what was found may be sound, but no model that this program knows.
fn is_of_no_known_model(error: &FormatError, path: &Path) -> bool {
    match error {
        FormatError::Unsupported { .. } => true,
        FormatError::Malformed { .. } => false,
        _ => !path.is_dir(),
    }
}

/// A safetensors file, or those of a folder, in the order of their names; empty of all others.
fn safetensors_files(path: &Path) -> Vec<PathBuf> {
    let is_list = |path: &PathBuf| path.extension().is_some_and(|name| name == "safetensors");
    let mut files = match path.read_dir() {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(_) => vec![path.to_owned()],
    };
    files.retain(is_list);
    files.sort();
    files
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
