//! The most products of 8-bit numbers that the processor computes, by a loop of nothing else.

#![allow(unsafe_code, reason = "instructions that only the processor's check makes safe")]

use std::{hint::black_box, time::Instant};

/// Products of a loop, as many as hide how long one takes.
const CHAINS: usize = 16;
const ROUNDS: usize = 4_000_000;

/// Multiply-adds a second of all threads together; `None` where there is no loop for the processor.
pub fn multiply_adds_per_second() -> Option<f64> {
    let (name, per_product, run) = fastest()?;
    let products = (CHAINS * ROUNDS * per_product) as f64;
    let rate = |_: rayon::BroadcastContext<'_>| {
        let start = Instant::now();
        run();
        products / start.elapsed().as_secs_f64()
    };
    // The first time clocks rise.
    rayon::broadcast(rate);
    let rates = rayon::broadcast(rate);
    let sum: f64 = rates.iter().sum();
    println!("peak of `{name}`: {:.0} G mul-add/s", sum / 1e9);
    Some(sum)
}

/// The instruction, its multiply-adds, and a loop of it.
type Loop = (&'static str, usize, fn());

#[cfg(target_arch = "x86_64")]
fn fastest() -> Option<Loop> {
    if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has what the loop enables.
        Some(("vpdpbusd, 512 bits", 64, || unsafe { avx512_vnni() }))
    } else if is_x86_feature_detected!("avxvnni") {
        // SAFETY: the processor has what the loop enables.
        Some(("vpdpbusd, 256 bits", 32, || unsafe { avx_vnni() }))
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the loop enables.
        Some(("vpmaddubsw, 256 bits", 32, || unsafe { avx2() }))
    } else {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fastest() -> Option<Loop> {
    None
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn avx512_vnni() {
    use std::arch::x86_64::{_mm512_dpbusd_epi32, _mm512_set1_epi8};

    let (a, b) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(1)));
    let mut sums = [a; CHAINS];
    for _ in 0..ROUNDS {
        sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, a, b));
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,avx2,avxvnni")]
fn avx_vnni() {
    use std::arch::x86_64::{_mm256_dpbusd_avx_epi32, _mm256_set1_epi8};

    let (a, b) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(1)));
    let mut sums = [a; CHAINS];
    for _ in 0..ROUNDS {
        sums.iter_mut().for_each(|sum| *sum = _mm256_dpbusd_avx_epi32(*sum, a, b));
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2() {
    use std::arch::x86_64::{_mm256_add_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8};

    let b = black_box(_mm256_set1_epi8(1));
    let mut sums = [b; CHAINS];
    for _ in 0..ROUNDS {
        // Of the sum itself, so that no product is the same as the one before.
        sums.iter_mut()
            .for_each(|sum| *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, b)));
    }
    black_box(sums);
}
