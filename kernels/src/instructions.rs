//! The instructions that this processor computes with.

use std::env::consts::ARCH;

use crate::{cpu::matvec, linalg};

/// The instruction sets that decide in which order sums are rounded, such as
/// `x86_64+avx512+vnni+amx`: the architecture, what `faer` takes, what multiplies one token with
/// packed layers, and what multiplies bf16 numbers. The same path gives the same bytes, on any
/// number of threads.
pub fn instruction_path() -> String {
    let method = format!("{:?}", matvec::Method::fastest());
    let parts =
        [Some(ARCH), vectors(), method.contains("VNNI").then_some("vnni"), linalg::bf16_unit()];
    parts.into_iter().flatten().collect::<Vec<_>>().join("+")
}

/// The widest vectors of which the matrix products of `faer` make use.
fn vectors() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return Some("avx512");
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return Some("avx2");
    }
    cfg!(target_arch = "aarch64").then_some("neon")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_names_what_the_kernels_take() {
        let path = instruction_path();
        let parts: Vec<_> = path.split('+').collect();
        assert_eq!(parts[0], ARCH);
        let known = ["avx512", "avx2", "neon", "vnni", "amx", "bf16"];
        assert!(parts[1..].iter().all(|part| known.contains(part)), "{path}");
        let unit = parts.into_iter().find(|part| ["amx", "bf16"].contains(part));
        assert_eq!(unit, linalg::bf16_unit());
    }
}
