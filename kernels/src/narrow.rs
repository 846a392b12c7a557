//! Numbers on their way into fewer bits: the one place that says whether they get there.

use half::{bf16, f16};
use rayon::prelude::*;
use slim_formats::{DType, DenseTensor, Weight};

use crate::{Result, weight};

/// Rows that are looked at together.
const ROWS: usize = 64;

/// How large the values of a matrix are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extent {
    /// The value with the largest magnitude, and its row.
    pub largest: (usize, f32),
    /// The median, over the rows that are not all zero, of the largest magnitude in a row: neither
    /// a few outliers nor a few rows that are close to nothing change it. 0 for a matrix of zeros.
    pub typical: f32,
    /// The first value that is not finite, and its row.
    pub not_finite: Option<(usize, f32)>,
}

impl Extent {
    /// Looks at all values of a matrix.
    ///
    /// # Errors
    /// `UnsupportedType` as for [`weight::dequantize_rows`].
    pub fn of(weight: Weight<'_>) -> Result<Self> {
        let (rows, cols) = weight::shape(weight);
        let pieces: Vec<_> = (0..rows.div_ceil(ROWS)).collect();
        let pieces = pieces.into_par_iter().map(|piece| {
            let rows = piece * ROWS..rows.min((piece + 1) * ROWS);
            let mut values = vec![0.0; rows.len() * cols];
            weight::dequantize_rows(weight, rows, &mut values)?;
            Ok(values.chunks_exact(cols.max(1)).map(largest).collect::<Vec<f32>>())
        });
        let of_rows = pieces.collect::<Result<Vec<_>>>()?.concat();
        let rows = || of_rows.iter().copied().enumerate();
        let mut magnitudes: Vec<f32> =
            of_rows.iter().map(|value| value.abs()).filter(|&value| value > 0.0).collect();
        magnitudes.sort_unstable_by(f32::total_cmp);
        Ok(Self {
            largest: rows().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap_or_default(),
            typical: magnitudes.get(magnitudes.len() / 2).copied().unwrap_or(0.0),
            not_finite: rows().find(|(_, value)| !value.is_finite()),
        })
    }

    /// Whether f16 holds the values: none is out of its range, and typical rows lose no more than
    /// in bf16. The steps of f16 are 2^-24 at zero.
    pub fn fits_f16(&self) -> bool {
        to_f16(self.largest.1).is_some() && (self.typical == 0.0 || self.typical >= (-17f32).exp2())
    }

    /// The type to keep a matrix in: F16 if it holds the values, otherwise BF16 or F32, whichever
    /// loses nothing of them.
    pub fn type_for(&self, weight: Weight<'_>) -> DType {
        match weight {
            _ if self.fits_f16() => DType::F16,
            Weight::Dense(DenseTensor { dtype: DType::BF16, .. }) => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// The value with the largest magnitude; the first one that is not finite, if there is one.
fn largest(row: &[f32]) -> f32 {
    let most = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    // `max` passes over NaN, a sum does not.
    match row.iter().map(|value| 0.0 * value).sum::<f32>() {
        0.0 => row.iter().copied().find(|value| value.abs() == most).unwrap_or(0.0),
        _ => row.iter().copied().find(|value| !value.is_finite()).unwrap_or(f32::NAN),
    }
}

/// The nearest number in the range of f16, which rounds to no infinite one.
pub(crate) fn in_range_of_f16(value: f32) -> f32 {
    value.clamp(f16::MIN.to_f32_const(), f16::MAX.to_f32_const())
}

/// The nearest f16; `None` if that is not finite.
pub fn to_f16(value: f32) -> Option<f16> {
    Some(f16::from_f32(value)).filter(|value| value.is_finite())
}

/// The little-endian bytes of `values` in type `dtype`: F32, F16 or BF16.
///
/// # Errors
/// The index of the first value that is not finite in this type.
///
/// # Panics
/// For another type.
pub fn to_bytes(dtype: DType, values: &[f32]) -> Result<Vec<u8>, usize> {
    let is_finite = |value: &f32| match dtype {
        DType::F16 => to_f16(*value).is_some(),
        DType::BF16 => bf16::from_f32(*value).is_finite(),
        _ => value.is_finite(),
    };
    if let Some(at) = values.iter().position(|value| !is_finite(value)) {
        return Err(at);
    }
    Ok(match dtype {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        other => panic!("{other:?} is no float type to narrow to"),
    })
}

#[cfg(test)]
mod tests {
    use slim_formats::Layout;

    use super::*;

    fn extent(values: &[f32], rows: usize) -> Extent {
        let bytes = to_bytes(DType::F32, values)
            .unwrap_or_else(|_| values.iter().flat_map(|value| value.to_le_bytes()).collect());
        let (cols, layout) = (values.len() / rows, Layout::AsStored);
        let dense =
            DenseTensor { dtype: DType::F32, rows, cols, bytes: &bytes, layout, scales: None };
        Extent::of(Weight::Dense(dense)).unwrap()
    }

    #[test]
    fn extent_names_the_row_of_the_largest_value_and_of_the_first_that_is_none() {
        let mut values = vec![0.5; 400];
        values[130] = -3.0;
        let found = extent(&values, 200);
        assert_eq!(found, Extent { largest: (65, -3.0), typical: 0.5, not_finite: None });
        values[399] = f32::NEG_INFINITY;
        values[301] = f32::NAN;
        let (row, value) = extent(&values, 200).not_finite.unwrap();
        assert!(row == 150 && value.is_nan());
        assert_eq!(extent(&[0.0; 4], 2).typical, 0.0);
    }

    #[test]
    fn f16_holds_what_it_neither_overflows_nor_loses() {
        for (values, fits) in [
            ([1.0, 2.0, 3.0, 65_519.0], true),
            ([1.0, 2.0, 3.0, 65_520.0], false),
            ([1.0, 2.0, 3.0, -70_000.0], false),
            ([0.0; 4], true),
            // Two rows of nothing beside others.
            ([1e-9, 1e-30, 0.1, 0.2], true),
            ([1e-9, 1e-9, 1e-9, 0.2], false),
            ([1e-5, 1e-5, 1e-5, 1e-5], true),
            ([1e-6, 1e-6, 1e-6, 1e-6], false),
        ] {
            assert_eq!(extent(&values, 4).fits_f16(), fits, "{values:?}");
        }
    }

    #[test]
    fn bytes_of_a_value_out_of_range_are_refused_with_its_place() {
        assert_eq!(to_bytes(DType::F16, &[1.0, 65_504.0]), Ok(vec![0, 0x3c, 0xff, 0x7b]));
        assert_eq!(to_bytes(DType::F16, &[1.0, 65_520.0]), Err(1));
        assert_eq!(to_bytes(DType::BF16, &[65_536.0]), Ok(vec![0x80, 0x47]));
        assert_eq!(to_bytes(DType::BF16, &[1.0, f32::MAX]), Err(1));
        assert_eq!(to_bytes(DType::F32, &[f32::NAN]), Err(0));
    }
}
