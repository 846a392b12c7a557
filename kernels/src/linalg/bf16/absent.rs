//! What stands in for a unit that a processor or system cannot have: nothing that could be called.

use super::{Precision, Product, Row};

#[derive(Debug, Clone, Copy)]
pub enum Unit {}

impl Unit {
    pub fn detect() -> Option<Self> {
        None
    }

    pub fn registers(self, _: Precision) -> Self {
        self
    }

    pub(super) fn multiply(self, _: &[Row], _: &[Row], _: &mut Product) {
        match self {}
    }
}
