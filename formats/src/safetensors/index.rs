//! Which file holds which tensor.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    path::{Component, Path, PathBuf},
};

use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;

use super::{fp8, mxfp4, scales::Scales};
use crate::{DType, FormatError, MappedFile, Result, json, locate, stand_in};

/// The mapped safetensors files of a model.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<MappedFile>,
}

/// Where a tensor lies and how to read it.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    shard: usize,
    range: Range<usize>,
    pub dtype: DType,
    /// 1 for a vector.
    pub rows: usize,
    pub cols: usize,
    /// Of a matrix in FP8 or MXFP4.
    pub scales: Option<Scales>,
}

/// Tensors under their names in a text model.
pub(super) type Table = HashMap<String, StoredTensor>;

/// Which tensors of the files belong to the text model, of a model that also sees or hears.
#[derive(Debug)]
pub(super) struct Parts {
    /// Whether there are others.
    is_part: bool,
    /// What was left out: how many tensors of which part.
    left_out: BTreeMap<&'static str, usize>,
}

impl Parts {
    /// Of a model whose text model is a part, or all of it.
    pub fn new(is_part: bool) -> Self {
        Self { is_part, left_out: BTreeMap::new() }
    }

    /// The name that a stored tensor has in a text model; `None` if it is of another part.
    fn name_of(&self, stored: &str) -> Option<String> {
        match self.other(stored) {
            Some(_) => None,
            // `model.language_model.`, `language_model.model.` and `language_model.lm_head.`.
            None if self.is_part => Some(stored.replace("language_model.", "")),
            None => Some(stored.to_owned()),
        }
    }

    /// As [`Self::name_of`]; counts what it leaves out.
    fn take(&mut self, stored: &str) -> Option<String> {
        if let Some(other) = self.other(stored) {
            *self.left_out.entry(other).or_default() += 1;
        }
        self.name_of(stored)
    }

    fn other(&self, stored: &str) -> Option<&'static str> {
        const OTHERS: [&str; 7] = [
            "vision_tower",
            "vision_model",
            "visual",
            "multi_modal_projector",
            "audio_tower",
            "embed_vision",
            "embed_audio",
        ];
        OTHERS.into_iter().find(|&other| self.is_part && stored.split('.').any(|s| s == other))
    }

    /// A sentence about what was left out of the model at `path`, if anything was.
    pub fn warning(&self, path: &Path) -> Option<String> {
        let counts =
            self.left_out.iter().map(|(part, count)| format!("`{part}` ({count} tensors)"));
        let counts = counts.collect::<Vec<_>>().join(", ");
        let path = path.display();
        (!counts.is_empty())
            .then(|| format!("`{path}`: only the text model is used; left out: {counts}"))
    }
}

impl Shards {
    /// Opens a model that is one file, with the tensors that `parts` names; `method` is how it says
    /// it is quantized, for messages.
    pub fn open_one(path: &Path, parts: &mut Parts, method: Option<&str>) -> Result<(Self, Table)> {
        let mut shards = Self { files: Vec::new() };
        let mut table = Table::new();
        shards.add(path, parts, method, &mut table)?;
        Ok((shards, table))
    }

    /// Opens the files in `folder` that the index names, and checks that it is right about each
    /// tensor.
    pub fn open_index(
        folder: &Path,
        index_path: &Path,
        index: &Value,
        parts: &mut Parts,
        method: Option<&str>,
    ) -> Result<(Self, Table)> {
        let malformed = |place: String, found: &str, expected: &str| {
            FormatError::malformed(index_path, place, "", found, expected)
        };
        let weight_map = index["weight_map"]
            .as_object()
            .ok_or_else(|| malformed("key `weight_map`".to_owned(), "none", "an object"))?;
        let mut file_of = HashMap::new();
        for (tensor, file) in weight_map {
            let expected = "the name of a `.safetensors` file in the same directory";
            let name = file.as_str().filter(|name| is_shard_name(name));
            let name = name.ok_or_else(|| {
                malformed(format!("tensor `{tensor}`"), &file.to_string(), expected)
            })?;
            file_of.insert(tensor, name);
        }

        let mut shards = Self { files: Vec::new() };
        let mut table = Table::new();
        let names: BTreeSet<&str> = file_of.values().copied().collect();
        if let Some(error) = locate::missing_shards(folder, &names) {
            return Err(error);
        }
        for &name in &names {
            shards.add(&folder.join(name), parts, method, &mut table)?;
        }
        for (shard, &name) in names.iter().enumerate() {
            let mut tensors = file_of.iter().filter(|&(_, &file)| file == name);
            let is_absent = |tensor: &String| {
                let wanted = parts.name_of(tensor);
                wanted
                    .is_some_and(|name| table.get(&name).is_none_or(|stored| stored.shard != shard))
            };
            if let Some((tensor, _)) = tensors.find(|(tensor, _)| is_absent(tensor)) {
                let expected = format!("a tensor in `{name}`");
                return Err(malformed(format!("tensor `{tensor}`"), "none", &expected));
            }
        }
        Ok((shards, table))
    }

    /// Maps one more file and enters its tensors.
    fn add(
        &mut self,
        path: &Path,
        parts: &mut Parts,
        method: Option<&str>,
        table: &mut Table,
    ) -> Result<()> {
        let file = MappedFile::open(path)?;
        stand_in::refuse(path, &file, "a safetensors file")?;
        let malformed = |place: String, found: String, expected: &str| {
            FormatError::malformed(path, place, "", found, expected)
        };
        let (header_bytes, header) = SafeTensors::read_metadata(&file).map_err(|error| {
            let hint = match error {
                SafeTensorError::InvalidHeaderLength
                | SafeTensorError::MetadataIncompleteBuffer => {
                    "the file has not the length that its header says, as after a download that \
                     broke off; fetch it again"
                }
                _ => "",
            };
            malformed("the header".to_owned(), error.to_string(), "a safetensors header")
                .with_hint(hint)
        })?;
        let data_start = 8 + header_bytes;
        // The library would keep the last of two entries.
        let text = String::from_utf8_lossy(&file[8..data_start]);
        json::parse(&text).map_err(|error| {
            malformed("the header".to_owned(), error.to_string(), "a safetensors header")
        })?;
        let tensors = header.tensors();
        if let Some((name, told)) =
            first_quantized(tensors.iter().map(|(name, info)| (name, info.dtype)))
        {
            let method = method.unwrap_or(told);
            let what = format!("a model quantized by {method} (tensor `{name}`)");
            let hint =
                "start from the model that it was made from, with fp16, bf16 or fp32 weights";
            return Err(FormatError::unsupported(path, what, hint));
        }
        for (name, info) in tensors {
            if name.ends_with("rotary_emb.cos_cached") || name.ends_with("rotary_emb.sin_cached") {
                continue;
            }
            let Some(name) = parts.take(&name) else { continue };
            let place = format!("tensor `{name}`");
            let (dtype, rows, cols) = match mxfp4::stored(&name, info) {
                Some(found) => found,
                None => {
                    let dtype = dtype_of(info.dtype).ok_or_else(|| {
                        let what = format!("{place}: element type {:?}", info.dtype);
                        let hint = "weights must be F16, BF16, F32, F8_E4M3 or MXFP4";
                        FormatError::unsupported(path, what, hint)
                    })?;
                    let shape = rows_and_cols(&name, &info.shape).ok_or_else(|| {
                        let found = format!("shape {:?}", info.shape);
                        malformed(place.clone(), found, "one to three dimensions, not 0")
                    })?;
                    (dtype, shape.0, shape.1)
                }
            };
            // `read_metadata` has checked that the ranges fill the file and agree with shape and
            // type.
            let (start, end) = info.data_offsets;
            let range = data_start + start..data_start + end;
            let (shard, scales) = (self.files.len(), None);
            let stored = StoredTensor { shard, range, dtype, rows, cols, scales };
            if table.insert(name, stored).is_some() {
                return Err(malformed(
                    place,
                    "a second tensor of this name".to_owned(),
                    "one in all shards",
                ));
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The bytes of a tensor of these files.
    pub fn bytes_of(&self, tensor: &StoredTensor) -> &[u8] {
        &self.files[tensor.shard][tensor.range.clone()]
    }

    /// As [`MappedFile::release_pages`].
    pub fn release_pages(&self) {
        self.files.iter().for_each(MappedFile::release_pages);
    }

    /// The files, in the order in which they were opened.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.files.iter().map(|file| file.path().to_owned())
    }
}

/// The shape of a tensor as rows and columns; `None` if it has none.
fn rows_and_cols(name: &str, shape: &[usize]) -> Option<(usize, usize)> {
    match *shape {
        [cols] if cols > 0 => Some((1, cols)),
        [] if fp8::is_scale(name) => Some((1, 1)),
        [rows, cols] if rows > 0 && cols > 0 => Some((rows, cols)),
        // Matrices of experts, one above the other. Their product is that of the bytes.
        [experts, rows, cols] if experts > 0 && rows > 0 && cols > 0 => {
            Some((experts * rows, cols))
        }
        _ => None,
    }
}

/// Whether a name is that of a file beside the index: nothing that names a folder, on any system.
fn is_shard_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let is_plain =
        matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    is_plain && name.ends_with(".safetensors") && !name.contains(['/', '\\', ':'])
}

/// The first tensor, by name, that only a quantized model has, and how it is quantized by its
/// looks.
fn first_quantized<'a>(
    tensors: impl Iterator<Item = (&'a String, Dtype)>,
) -> Option<(&'a str, &'static str)> {
    const METHODS: [(&str, &[&str]); 6] = [
        ("GPTQ or AWQ", &[".qweight", ".qzeros", ".g_idx"]),
        ("bitsandbytes", &[".absmax", ".quant_map", ".nested_absmax", ".SCB", ".weight_format"]),
        ("compressed-tensors", &[".weight_packed", ".weight_shape", ".weight_zero_point"]),
        ("EXL2 or EXL3", &[".q_weight", ".q_scale", ".trellis", ".suh"]),
        ("AQLM", &[".codebooks", ".codes"]),
        ("HQQ or MLX", &[".W_q", ".scales", ".biases"]),
    ];
    let found = tensors.filter_map(|(name, dtype)| {
        let has = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
        if let Some((method, _)) = METHODS.iter().find(|(_, suffixes)| has(suffixes)) {
            return Some((false, name.as_str(), *method));
        }
        let by_type = match dtype {
            Dtype::F8_E5M2 => "FP8 with 5 bits of exponent",
            Dtype::U32 => "MLX",
            Dtype::I8 | Dtype::U8 => "8-bit or 4-bit integers",
            _ => return None,
        };
        name.ends_with(".weight").then_some((true, name.as_str(), by_type))
    });
    // A name tells more than a type.
    found.min().map(|(_, name, method)| (name, method))
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F32 => Some(DType::F32),
        Dtype::F8_E4M3 => Some(DType::F8_E4M3),
        _ => None,
    }
}
