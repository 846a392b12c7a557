//! The size of a file: foretold to the byte, and met from below.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use slim_converter::{
    BUILT_IN_CALIBRATION, Begin, Calibration, Contents, Engine, Job, Method, Resources, Settings,
    Target, WorkFolder, convert,
};
use slim_formats::{
    Decoder, DenseTensor, FormatError, ModelConfig, ModelSource, OutputPath, TokenizerSource,
    Weight, open_model,
    slim::{ScaleCoding, SlimFile},
};
use slim_runtime::Tokenizer;

use crate::command::{Dir, tiny_model};

const TWO_LEVEL: ScaleCoding = ScaleCoding::TwoLevel { sub_group: 32, scale_bits: 4 };

fn settings(method: Method, target: Option<Target>) -> Settings {
    Settings {
        bits: 3,
        target,
        group_size: 32,
        coding: TWO_LEVEL,
        method,
        embed_bits: Some(8),
        samples: 2,
        context: 32,
        seed: 0,
        steps: 2,
        draws_text: false,
        split_max_bytes: None,
    }
}

/// Converts, and gives the size of the file.
fn convert_to(source: &dyn ModelSource, settings: &Settings, file: &Path) -> u64 {
    let tokenizer = Tokenizer::new(source.tokenizer()).unwrap();
    let text = &BUILT_IN_CALIBRATION[..20_000];
    let calibration = Calibration::from_text(text, &tokenizer, settings).unwrap();
    let resources = Resources { engine: Engine::Cpu, float_bytes: 1 << 30 };
    let output = OutputPath { path: file, replaces: true };
    let work = &WorkFolder::beside(file, Begin::New, Arc::default()).unwrap();
    let job = Job { source, calibration: &calibration, settings, work };
    let report = convert(&job, &resources, output, &mut |_| {}).unwrap();
    let bytes = std::fs::metadata(file).unwrap().len();
    assert_eq!(report.file_bytes, bytes);
    let faults = SlimFile::open(file).unwrap().verify();
    assert!(faults.is_empty(), "{faults:?}");
    bytes
}

/// A model with fewer channels between the feed-forward layers, which fill no whole units of 16.
struct Narrow {
    source: Box<dyn ModelSource>,
    config: ModelConfig,
    decoder: Decoder,
    /// The first columns of each `ffn_down`.
    downs: Vec<Vec<u8>>,
}

impl Narrow {
    const FFN: usize = 72;

    fn new(source: Box<dyn ModelSource>) -> Self {
        let config = ModelConfig { ffn_size: Self::FFN, ..source.config().clone() };
        let down = |block| {
            let Ok(Some(Weight::Dense(all))) =
                source.tensor(&format!("blk.{block}.ffn_down.weight"))
            else {
                panic!("a dense tensor");
            };
            let row_bytes = all.bytes.len() / all.rows;
            let rows = all.bytes.chunks_exact(row_bytes);
            rows.flat_map(|row| &row[..row_bytes / all.cols * Self::FFN]).copied().collect()
        };
        let downs = (0..config.block_count).map(down).collect();
        Self { source, decoder: Decoder::new(&config), config, downs }
    }
}

impl ModelSource for Narrow {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn format(&self) -> &'static str {
        self.source.format()
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn tensor_names(&self) -> Vec<&str> {
        self.source.tensor_names()
    }

    fn tensor(&self, name: &str) -> Result<Option<Weight<'_>>, FormatError> {
        let Some(Weight::Dense(all)) = self.source.tensor(name)? else { return Ok(None) };
        let narrow = match name.split('.').collect::<Vec<_>>()[..] {
            ["blk", _, "ffn_gate" | "ffn_up", _] => {
                let bytes = &all.bytes[..all.bytes.len() / all.rows * Self::FFN];
                DenseTensor { rows: Self::FFN, bytes, ..all }
            }
            ["blk", block, "ffn_down", _] => {
                let bytes = &self.downs[block.parse::<usize>().unwrap()];
                DenseTensor { cols: Self::FFN, bytes, ..all }
            }
            _ => all,
        };
        Ok(Some(Weight::Dense(narrow)))
    }

    fn tokenizer(&self) -> &TokenizerSource {
        self.source.tokenizer()
    }

    fn chat_template(&self) -> Option<&str> {
        self.source.chat_template()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.source.files()
    }
}

/// An untied model, a tied one with scaled RoPE, and one with columns that are no multiple of 16.
fn models() -> [Box<dyn ModelSource>; 3] {
    let open = |name| open_model(&tiny_model(name)).unwrap();
    [open("llama"), open("llama-tied-rope3"), Box::new(Narrow::new(open("mistral-swa")))]
}

#[test]
fn file_of_even_widths_is_as_large_as_foretold() {
    let dir = Dir::new();
    let file = dir.path("model.slim.gguf");
    for source in models() {
        for (method, coding, embed_bits, bits) in [
            (Method::Gptq, TWO_LEVEL, 8, 3),
            (Method::RoundToNearest, ScaleCoding::Paper, 16, 1),
            (Method::RoundToNearest, ScaleCoding::Paper, 8, 5),
            (Method::RoundToNearest, TWO_LEVEL, 16, 2),
        ] {
            let embed_bits = Some(embed_bits);
            let settings = Settings { coding, embed_bits, bits, ..settings(method, None) };
            let foretold = Contents::new(&*source, &settings).unwrap().file_bytes().unwrap();
            let found = convert_to(&*source, &settings, &file);
            assert_eq!(found, foretold, "{:?}, {settings:?}", source.path());
        }
    }
}

#[test]
fn target_size_is_met_from_below_by_both_methods() {
    let dir = Dir::new();
    let file = dir.path("model.slim.gguf");
    for source in models() {
        let size = |bits| {
            let settings = Settings { bits, ..settings(Method::Gptq, None) };
            Contents::new(&*source, &settings).unwrap().file_bytes().unwrap()
        };
        let [least, most] = [1, 8].map(size);
        // Two bits more for a group of 32 columns in the layer with the most rows, where one more
        // is no bargain, and the change of padding that comes with them.
        let rows = source.config().ffn_size.max(source.config().hidden_size) as u64;
        let step = 2 * rows.next_multiple_of(16) * 32 / 8 + 64;
        for share in [0.02, 0.2, 0.5, 0.9] {
            let bytes = least + (share * (most - least) as f64) as u64;
            let target = Some(Target::FileBytes(bytes));
            for (method, embed_bits) in
                [(Method::Slim, Some(8)), (Method::SlimPlus, Some(8)), (Method::Slim, None)]
            {
                let settings = Settings { embed_bits, ..settings(method, target) };
                let found = convert_to(&*source, &settings, &file);
                println!("{:?}, {settings:?}: {found} bytes", source.path());
                assert!(found <= bytes && bytes - found <= step, "{found} of {bytes} bytes");
            }
        }
        let file = SlimFile::open(&file).unwrap();
        let metadata = file.gguf().metadata();
        assert!(metadata.u64("slim.quantization.target_file_bytes").unwrap() > least);
        assert!(!metadata.contains("slim.quantization.bits"));
    }
}

#[test]
fn smallest_target_is_reached_and_a_smaller_one_refused() {
    let dir = Dir::new();
    let file = dir.path("model.slim.gguf");
    let source = open_model(&tiny_model("llama")).unwrap();
    let with = |bytes| settings(Method::SlimPlus, Some(Target::FileBytes(bytes)));
    // Any target within reach gives the same size, that of the lowest widths.
    let mut least = Contents::new(&*source, &with(1 << 30)).unwrap().file_bytes().unwrap();
    // Bands take some bytes: without them a smaller one is within reach.
    while let Ok(contents) = Contents::new(&*source, &with(least - 1)) {
        assert!(contents.file_bytes().unwrap() < least && !contents.has_bands());
        least = contents.file_bytes().unwrap();
    }
    assert_eq!(convert_to(&*source, &with(least), &file), least);
    let Err(error) = Contents::new(&*source, &with(least - 1)) else { panic!("no error") };
    let error = error.to_string();
    assert!(error.starts_with("target size: found ") && error.contains(" kB, expected at least "));
}
