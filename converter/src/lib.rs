//! Quantizes a model layer by layer with SliM-LLM and packs it into a SliM file.
//!
//! [`convert`] is the way in; `docs/slim-llm.md` maps the paper's equations to the modules.

mod activations;
mod allocate;
pub mod backward;
mod bands;
mod bound;
mod budget;
mod calibration;
mod calibrator;
mod coder;
mod contents;
mod convert;
mod distill;
mod engine;
mod error;
mod finite;
mod fit;
mod floats;
#[cfg(test)]
mod golden;
mod hessian;
mod lanes;
mod layer;
mod neurons;
mod probe;
mod provenance;
mod published;
mod quality;
mod report;
mod rows;
mod salience;
mod settings;
mod sweep;
mod target;
#[cfg(test)]
mod tests;
mod trellis;
mod work;
mod work_folder;
mod zeros;

use activations::Activations;
pub use bound::{MOST_BYTES, Trial, convert_within};
pub use calibration::{BUILT_IN_CALIBRATION, Calibration};
pub use calibrator::float_bytes;
pub use contents::{Contents, PlannedTensor, Storage};
pub use convert::{Job, convert};
pub use distill::distill;
pub use engine::Engine;
pub use error::{ConvertError, Result};
pub use layer::SLAB_ROWS;
pub use probe::{Foretold, foretell};
pub use provenance::{COMMIT, DRAWN, source_metadata};
pub use quality::{
    Domain, Profile, Quality, Ruler, USELESS_KL, predict_quality, profile, quality_bytes,
};
pub use report::{Degenerate, LayerReport, Progress, Report};
pub use settings::{Method, Resources, Settings, Target};
pub use work::Work;
pub use work_folder::{Begin, WorkFolder, has_records};
