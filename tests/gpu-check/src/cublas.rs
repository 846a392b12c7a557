//! cuBLAS, where the machine has it: what products with many tokens are measured against.
#![allow(unsafe_code, reason = "cuBLAS takes addresses")]

use std::{ffi::c_void, sync::Arc};

use anyhow::Result;
use cudarc::{
    cublas::{CudaBlas, result::gemm_ex, sys},
    driver::{CudaSlice, DevicePtr, DevicePtrMut},
};
use slim_kernels::cuda::Device;

use crate::{bench::median, weights::half_bits};

pub struct Cublas {
    blas: CudaBlas,
    device: Arc<Device>,
}

impl Cublas {
    /// `None` if the machine has no cuBLAS.
    pub fn find(device: &Arc<Device>) -> Result<Option<Self>> {
        // SAFETY: loads `libcublas.so`, whose initialisers may run on any thread at any time.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let blas = CudaBlas::new(Arc::clone(device.stream()))?;
        Ok(Some(Self { blas, device: Arc::clone(device) }))
    }

    /// Median seconds of `x * w^T` in fp16 for `w: [rows, cols]` and so many tokens, with `copies`
    /// of w by turns.
    pub fn seconds(
        &self,
        [rows, cols]: [usize; 2],
        tokens: usize,
        copies: usize,
        runs: usize,
    ) -> Result<f64> {
        let stream = self.device.stream();
        let upload = |seed, len| stream.clone_htod(&half_bits(seed, len));
        let w = (0..copies).map(|_| upload(1, rows * cols)).collect::<Result<Vec<_>, _>>()?;
        let x = upload(2, tokens * cols)?;
        let mut out = stream.alloc_zeros::<u16>(tokens * rows)?;
        let mut failed = None;
        let seconds = self.device.time(runs, || {
            for w in &w {
                if let Err(error) = self.multiply(w, &x, &mut out, [rows, cols, tokens]) {
                    failed = Some(error);
                }
            }
            Ok(())
        })?;
        match failed {
            Some(error) => Err(error),
            None => Ok(median(seconds) / copies as f64),
        }
    }

    /// `out: [tokens, rows] = x: [tokens, cols] * w^T: [rows, cols]`.
    fn multiply(
        &self,
        w: &CudaSlice<u16>,
        x: &CudaSlice<u16>,
        out: &mut CudaSlice<u16>,
        [rows, cols, tokens]: [usize; 3],
    ) -> Result<()> {
        assert!(w.len() == rows * cols && x.len() == tokens * cols && out.len() == tokens * rows);
        let stream = self.device.stream();
        let (one, zero) = (1.0_f32, 0.0_f32);
        let half = sys::cudaDataType::CUDA_R_16F;
        let (w, x, out) =
            (w.device_ptr(stream).0, x.device_ptr(stream).0, out.device_ptr_mut(stream).0);
        // SAFETY: in cuBLAS's columns w is [cols, rows], x [cols, tokens], out [rows, tokens],
        // without gaps; they are as large as that (above). The factors are read before the call
        // returns.
        unsafe {
            gemm_ex(
                *self.blas.handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                rows as i32,
                tokens as i32,
                cols as i32,
                (&raw const one).cast(),
                w as *const c_void,
                half,
                cols as i32,
                x as *const c_void,
                half,
                cols as i32,
                (&raw const zero).cast(),
                out as *mut c_void,
                half,
                rows as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )?;
        }
        Ok(())
    }
}
