//! Every operation of the device against the scalar reference.

mod attention;
mod model;
mod operations;
mod products;

use std::{fmt::Display, sync::Arc, time::Instant};

use anyhow::Result;
use slim_kernels::{KvType, cuda::Device};

use crate::report::{Bound, Report};

/// Bound of `||found - expected|| / ||expected||`. Kernels round weights and results to fp16 (11
/// bits): measured up to 6.5e-4.
const HALF_ERROR: f64 = 2e-3;
/// What must be the same.
const NO_ERROR: f64 = 0.0;

/// Numbers of tokens that the kernels of few tokens take; each case of a test multiplies with all
/// of them.
const FEW: &[&[usize]] = &[&[1, 2, 3, 5, 8]];
/// And those of many tokens; each case takes the next.
const MANY: &[&[usize]] = &[&[9], &[64], &[130], &[300]];

/// What the cases of one test have shown.
#[derive(Default)]
pub struct Check {
    cases: usize,
    /// The largest error, and the case that has it.
    worst: f64,
    worst_case: String,
}

impl Check {
    /// Compares numbers; NaN never passes.
    pub fn near(&mut self, case: impl Display, found: &[f32], expected: &[f32]) {
        let pairs = || found.iter().zip(expected).map(|(&f, &e)| (f64::from(f), f64::from(e)));
        let error = pairs().map(|(f, e)| (f - e).powi(2)).sum::<f64>().sqrt();
        let norm = pairs().map(|(_, e)| e * e).sum::<f64>().sqrt();
        match found.len() == expected.len() {
            true => self.add(case, if error == 0.0 { 0.0 } else { error / norm }),
            false => self.add(case, f64::INFINITY),
        }
    }

    /// Compares what must be the same.
    pub fn same<T: PartialEq>(&mut self, case: impl Display, found: &T, expected: &T) {
        self.add(case, if found == expected { 0.0 } else { f64::INFINITY });
    }

    fn add(&mut self, case: impl Display, error: f64) {
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if self.cases == 0 || error > self.worst {
            (self.worst, self.worst_case) = (error, case.to_string());
        }
        self.cases += 1;
    }
}

/// Runs every test.
pub fn run(device: &Arc<Device>, report: &mut Report) {
    let mut test = |name: &str, bound: f64, run: &dyn Fn(&mut Check) -> Result<()>| {
        let (mut check, start) = (Check::default(), Instant::now());
        let outcome = run(&mut check);
        let Check { cases, worst, worst_case } = check;
        let error = if bound == NO_ERROR { String::new() } else { format!("error {worst:.1e}, ") };
        let found = match &outcome {
            Ok(()) => format!("{cases} cases, {error}{:.1?}", start.elapsed()),
            Err(_) => format!("stopped after {cases} cases"),
        };
        let text = if bound == NO_ERROR { "the same".into() } else { format!("<= {bound:.0e}") };
        let is_kept = outcome.is_ok() && cases > 0 && worst <= bound;
        report.tested(name, found, &Bound { text, is_kept });
        if worst > 0.0 {
            println!("    largest error: {worst_case}");
        }
        if let Err(error) = outcome {
            println!("    {error:#}");
        }
    };
    for (kernel, tokens) in [("matvec", FEW), ("matmul", MANY)] {
        let mut test = |name: &str, run: &dyn Fn(&mut Check) -> Result<()>| {
            test(&format!("{kernel}: {name}"), HALF_ERROR, run);
        };
        test("widths and codings", &|check| products::widths(device, check, tokens));
        test("group sizes and rows", &|check| products::shapes(device, check, tokens));
        test("any number of columns", &|check| products::columns(device, check, tokens));
        test("extreme codes and scales", &|check| products::extremes(device, check, tokens));
        test("dense weights", &|check| products::dense(device, check, tokens));
        test("several matrices at once", &|check| products::several(device, check, tokens));
        test("add, and the norm that follows", &|check| products::add(device, check, tokens));
        test("neurons", &|check| products::neurons(device, check, tokens));
    }
    test("embed", NO_ERROR, &|check| operations::embed(device, check));
    test("norm", HALF_ERROR, &|check| operations::norm(device, check));
    test("activate", HALF_ERROR, &|check| operations::activate(device, check));
    test("top_k", NO_ERROR, &|check| operations::top_k(device, check));
    test("gemm_f32", HALF_ERROR, &|check| operations::gemm(device, check));
    for (name, kv_type) in [("fp16", KvType::F16), ("q8", KvType::Q8)] {
        test(&format!("rope and attention, {name}: decode"), HALF_ERROR, &|check| {
            attention::decode(device, check, kv_type)
        });
        test(&format!("rope and attention, {name}: prefill"), HALF_ERROR, &|check| {
            attention::prefill(device, check, kv_type)
        });
    }
    test("same bits twice", NO_ERROR, &|check| operations::twice(device, check));
    test("same bits from a graph", NO_ERROR, &|check| operations::graph(device, check));
    test("model: logits", model::LOGITS_ERROR, &|check| model::logits(device, check));
    test("model: q8 cache", model::Q8_ERROR, &|check| model::q8(device, check));
    test("model: one block on the CPU", model::SPLIT_ERROR, &|check| model::split(device, check));
    test("model: greedy tokens", NO_ERROR, &|check| model::greedy(device, check));
}
