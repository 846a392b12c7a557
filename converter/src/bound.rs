//! The smallest file that keeps a promise: its mean divergence from its source is at most so much.
//!
//! The survey predicts what a file of a size loses; what one does lose is measured. Each conversion
//! that is tried tells how the two compare, and thereby which size to try next.

use std::fs;

use slim_formats::{
    FormatError, OutputPath,
    gguf::{Metadata, Value},
};

use crate::{
    ConvertError, Job, Progress, Report, Resources, Result, Ruler, Settings, Target, Work,
    budget::Costs,
    contents::Contents,
    convert::{quantize, surveyed},
    provenance::{self, TARGET_BYTES},
    work_folder::Record,
};

/// Conversions that are tried at most.
const TRIALS: usize = 6;

/// The divergence that a size is chosen for, and the least that is taken for close enough, as
/// shares of what is promised.
const AIM: f64 = 0.95;
const CLOSE: f64 = 0.9;

/// A size that was tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trial {
    /// Size of the file.
    pub file_bytes: u64,
    /// The divergence from the source that the survey predicts, in nats per token.
    pub predicted: f64,
    /// The divergence as it was measured.
    pub measured: f64,
}

/// Converts as [`convert`](crate::convert()) does into the smallest file whose divergence from the
/// source, as `ruler` measures it, is at most `most`, as far as a few conversions find it; the
/// report has what was tried.
///
/// # Errors
/// As [`convert`](crate::convert()), and those of the ruler; `InvalidSetting` if not even the
/// widest groups keep the promise.
pub fn convert_within<'p>(
    job: &Job<'_>,
    most: f64,
    ruler: &Ruler,
    resources: &Resources,
    target: impl Into<OutputPath<'p>>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let Job { source, calibration, settings, work } = *job;
    let (settings, target) = (&of_size(settings, MOST_BYTES), target.into());
    let job = &Job { settings, ..*job };
    settings.validate()?;
    target.check_file()?;
    let instructions = resources.engine.instruction_path();
    // Once: it has the hashes of the source's files.
    let metadata = provenance::metadata(source, calibration, settings, &instructions)?;
    let mut identity = metadata.clone();
    identity.insert("slim.quantization.max_kl", Value::F64(most))?;
    work.identify(&identity)?;
    work.create()?;

    let contents = Contents::computed_by(source, settings, &instructions)?;
    for kind in Work::ALL {
        let planned = kind.planned(source.decoder(), &contents, settings, Some(work));
        progress(Progress::Planned(kind, planned));
    }
    let survey = surveyed(job, &contents, &mut { resources.float_bytes }, progress)?;
    let mut search = Search { costs: survey.costs, contents, most, trials: Vec::new() };
    while let Some((bytes, predicted)) = search.next()? {
        let mut quietly = |step: Progress<'_>| match step {
            // The last conversion tells them.
            Progress::Warning(_) => {}
            step => progress(step),
        };
        let record = format!("trial.{bytes}");
        let measured = work.get(&record).and_then(|record| record.get("divergence"));
        let measured = match measured.as_deref() {
            Some(&[measured]) => measured,
            _ => {
                let path = work.path().join(format!("{bytes}.slim.gguf"));
                if !path.exists() {
                    let job = Job { settings: &of_size(settings, bytes), ..*job };
                    let metadata = with_size(&metadata, bytes)?;
                    quantize(&job, metadata, resources, (&path).into(), None, &mut quietly)?;
                }
                let measured = ruler.divergence(&path)?;
                work.put(&record, &Record::default().with("divergence", &[measured]))?;
                // Its matrices are recorded.
                fs::remove_file(&path)
                    .map_err(|error| FormatError::io(&path, "remove the file", error))?;
                measured
            }
        };
        search.trials.push(Trial { file_bytes: bytes, predicted, measured });
    }
    let Some(kept) = search.kept() else {
        // The last one tried has the widest groups.
        let least = search.broken().map_or(f64::NAN, |trial| trial.measured);
        work.remove();
        return Err(ConvertError::InvalidSetting {
            what: "mean divergence from the source",
            found: format!("at most {most}"),
            expected: format!("at least {least:.1e} nats per token, which 8 bits everywhere lose"),
        });
    };
    search.trials.retain(|trial| *trial != kept);
    search.trials.push(kept);
    let last = Job { settings: &of_size(settings, kept.file_bytes), ..*job };
    let metadata = with_size(&metadata, kept.file_bytes)?;
    let parts = settings.split_max_bytes;
    let report = quantize(&last, metadata, resources, target, parts, progress)?;
    work.remove();
    Ok(Report { trials: search.trials, ..report })
}

/// More than any file takes.
pub const MOST_BYTES: u64 = 1 << 60;

fn of_size(settings: &Settings, bytes: u64) -> Settings {
    Settings { target: Some(Target::FileBytes(bytes)), ..settings.clone() }
}

/// The metadata of a conversion to another size.
fn with_size(metadata: &Metadata, bytes: u64) -> Result<Metadata> {
    let mut sized = Metadata::new();
    for (key, value) in metadata.iter() {
        let value = if key == TARGET_BYTES { bytes.into() } else { value.clone() };
        sized.insert(key, value)?;
    }
    Ok(sized)
}

/// Which sizes to try.
struct Search {
    costs: Costs,
    contents: Contents,
    /// What is promised.
    most: f64,
    trials: Vec<Trial>,
}

impl Search {
    /// Whether a file keeps the promise: not if its divergence is no number.
    fn keeps(&self, trial: &Trial) -> bool {
        trial.measured <= self.most
    }

    /// The smallest file that keeps the promise.
    fn kept(&self) -> Option<Trial> {
        let keep = self.trials.iter().filter(|trial| self.keeps(trial));
        keep.min_by_key(|trial| trial.file_bytes).copied()
    }

    /// The largest one that does not.
    fn broken(&self) -> Option<Trial> {
        let broken = self.trials.iter().filter(|trial| !self.keeps(trial));
        broken.max_by_key(|trial| trial.file_bytes).copied()
    }

    /// The size to try next and its predicted divergence; `None` if no other is worth it.
    fn next(&self) -> Result<Option<(u64, f64)>> {
        let (kept, broken) = (self.kept(), self.broken());
        let is_close = kept.is_some_and(|trial| trial.measured >= CLOSE * self.most);
        if is_close || self.trials.len() >= TRIALS {
            return Ok(None);
        }
        let ratio = self.trials.last().map(|trial| trial.measured / trial.predicted);
        let ratio = ratio.filter(|ratio| ratio.is_finite() && *ratio > 0.0).unwrap_or(1.0);
        let mut wanted = vec![AIM * self.most / ratio];
        match (kept, broken) {
            // Prediction and measurement disagree about an order of sizes: between the two.
            (Some(kept), Some(broken)) => wanted.push((kept.predicted * broken.predicted).sqrt()),
            // The last one answers whether any size does.
            (None, _) if self.trials.len() + 1 == TRIALS => wanted = vec![0.0],
            (None, Some(_)) => wanted.push(0.0),
            _ => {}
        }
        for most in wanted {
            let (bytes, predicted) = self.costs.smallest(most, &self.contents)?;
            let is_smaller = kept.is_none_or(|kept| bytes < kept.file_bytes);
            if is_smaller && broken.is_none_or(|broken| bytes > broken.file_bytes) {
                return Ok(Some((bytes, predicted)));
            }
        }
        Ok(None)
    }
}
