//! Groups without a weight.

/// The groups of a layer in which nothing but 0 has been seen so far.
pub struct ZeroGroups {
    cols: usize,
    group_size: usize,
    is_zero: Vec<bool>,
}

impl ZeroGroups {
    /// Those of a layer of `cols` columns.
    pub fn new(cols: usize, group_size: usize) -> Self {
        Self { cols, group_size, is_zero: vec![true; cols.div_ceil(group_size)] }
    }

    /// Looks at some rows, `[.., cols]`.
    pub fn see(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.cols) {
            for (is_zero, weights) in self.is_zero.iter_mut().zip(row.chunks(self.group_size)) {
                *is_zero = *is_zero && weights.iter().all(|&weight| weight == 0.0);
            }
        }
    }

    /// How many they are.
    pub fn count(&self) -> u64 {
        self.is_zero.iter().filter(|&&is_zero| is_zero).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_with_one_weight_in_any_row_is_none() {
        let mut groups = ZeroGroups::new(5, 2);
        groups.see(&[0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(groups.count(), 3);
        groups.see(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.0, 0.0, 1.0, 0.0]);
        assert_eq!(groups.count(), 2);
    }
}
