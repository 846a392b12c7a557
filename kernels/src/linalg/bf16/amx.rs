//! The tile registers of AMX, the matrix unit of recent Intel server processors.
#![allow(
    unsafe_code,
    reason = "there are no stable intrinsics for AMX: its instructions are written in assembly"
)]

use std::{arch::asm, marker::PhantomData};

use super::{Precision, Product, Row, step_rows};

/// Says that this processor has AMX, and that the system lets this process use it.
#[derive(Debug, Clone, Copy)]
pub struct Unit(());

/// The tile registers of this thread, ready for products of a precision.
pub struct Registers {
    precision: Precision,
    /// They belong to this thread.
    thread: PhantomData<*const ()>,
}

/// `ldtilecfg`'s operand.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Configuration>() == 64);

impl Unit {
    /// Asks the processor, and Linux for the tile registers.
    pub fn detect() -> Option<Self> {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
        if features & AMX_BF16 == 0 || features & AMX_TILE == 0 {
            return None;
        }
        // SAFETY: this request takes a number and touches no memory of the process.
        let refusal =
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        (refusal == 0).then_some(Self(()))
    }

    /// Eight tiles of 16 rows of 64 bytes.
    pub fn registers(self, precision: Precision) -> Registers {
        let configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: std::array::from_fn(|tile| if tile < 8 { 64 } else { 0 }),
            rows: std::array::from_fn(|tile| if tile < 8 { 16 } else { 0 }),
        };
        // SAFETY: `self` says that the instruction may be used, and it accepts this operand.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly))
        }
        Registers { precision, thread: PhantomData }
    }
}

impl Drop for Registers {
    /// Idle registers need not be saved when the system turns to another thread.
    fn drop(&mut self) {
        // SAFETY: an `Unit` has said that the instruction may be used; the compiler keeps
        // nothing in these registers.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

/// Sums in tiles 0 to 3 what each of `steps` adds to them, and stores them as `product`: tile 4
/// and 5 hold lanes of the left factor, 6 and 7 of the right one.
macro_rules! sum_products {
    ($left:ident, $right:ident, $steps:ident, $product:ident; $($step:literal,)*) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "test {steps}, {steps}",
            "jz 3f",
            "2:",
            $($step,)*
            "dec {steps}",
            "jnz 2b",
            "3:",
            "tilestored [{out} + {out_row}], tmm0",
            "tilestored [{out} + {out_row} + 64], tmm1",
            "tilestored [{out} + {out_row} + 2048], tmm2",
            "tilestored [{out} + {out_row} + 2112], tmm3",
            left = inout(reg) $left.as_ptr() => _,
            right = inout(reg) $right.as_ptr() => _,
            steps = inout(reg) $steps => _,
            row = in(reg) size_of::<Row>(),
            out = in(reg) $product.0.as_mut_ptr(),
            out_row = in(reg) size_of_val(&$product.0[0]),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl Registers {
    /// The product of 32 lanes with 32 lanes, both of this precision, over equally many steps.
    pub(super) fn multiply(&mut self, left: &[Row], right: &[Row], product: &mut Product) {
        let step_rows = step_rows(self.precision);
        assert!(left.len() == right.len() && left.len().is_multiple_of(step_rows));
        let steps = left.len() / step_rows;
        match self.precision {
            Precision::Fine => self.multiply_fine(left, right, steps, product),
            Precision::Coarse => self.multiply_coarse(left, right, steps, product),
        }
    }

    fn multiply_coarse(
        &mut self,
        left: &[Row],
        right: &[Row],
        steps: usize,
        product: &mut Product,
    ) {
        // As `multiply_fine` without the lower parts. SAFETY: `self` says that the registers
        // are configured. Each step reads 2048 bytes of either slice, which has 32 rows of 64
        // bytes for each (`multiply`); the four sums take the 32 rows of 128 bytes of
        // `product`.
        unsafe {
            sum_products!(left, right, steps, product;
                "tileloadd tmm6, [{right} + {row}]",
                "tileloadd tmm4, [{left} + {row}]",
                "tileloadd tmm7, [{right} + {row} + 1024]",
                "tileloadd tmm5, [{left} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "add {right}, 2048",
            );
        }
    }

    fn multiply_fine(&mut self, left: &[Row], right: &[Row], steps: usize, product: &mut Product) {
        // A step has the upper parts of lanes 0 to 15 at byte 0, those of lanes 16 to 31 at
        // 1024, lower parts at 2048 and 3072. SAFETY: `self` says that the registers are
        // configured. Each step reads 4096 bytes of either slice, which has 64 rows of 64 bytes
        // for each (`multiply`); the four sums take the 32 rows of 128 bytes of `product`.
        unsafe {
            sum_products!(left, right, steps, product;
                "tileloadd tmm6, [{right} + {row}]",
                "tileloadd tmm7, [{right} + {row} + 1024]",
                "tileloadd tmm4, [{left} + {row} + 2048]",
                "tileloadd tmm5, [{left} + {row} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{left} + {row}]",
                "tileloadd tmm5, [{left} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{right} + {row} + 2048]",
                "tileloadd tmm7, [{right} + {row} + 3072]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 4096",
                "add {right}, 4096",
            );
        }
    }
}
