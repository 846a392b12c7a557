//! The fields of a request, each of which has to be taken.

use std::{fmt::Display, ops::RangeInclusive};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use super::ApiError;

/// The fields that nobody has taken yet.
pub struct Fields(Map<String, Json>);

impl Fields {
    /// # Errors
    /// If the body is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Json::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::bad("the body is JSON, but no object")),
            Err(error) => Err(ApiError::bad(format!("the body is no JSON: {error}"))),
        }
    }

    /// A field, unless it is absent or null.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.0.shift_remove(name) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|error| ApiError::value(name, error.to_string())),
        }
    }

    /// A number within a range.
    ///
    /// # Errors
    /// If it is none, or lies outside.
    pub fn take_in<T: DeserializeOwned + PartialOrd + Display>(
        &mut self,
        name: &str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.take(name)? {
            None => Ok(None),
            Some(value) if range.contains(&value) => Ok(Some(value)),
            Some(value) => {
                let (least, most) = (range.start(), range.end());
                let message = format!("found {value}, expected {least} to {most}");
                Err(ApiError::value(name, message))
            }
        }
    }

    /// Leaves out what changes nothing.
    pub fn ignore(&mut self, names: &[&str]) {
        names.iter().for_each(|name| drop(self.0.shift_remove(*name)));
    }

    /// Refuses a field unless it is absent, null, or has the value that it has by itself.
    ///
    /// # Errors
    /// Its name.
    pub fn refuse_unless(&mut self, name: &str, usual: &Json) -> Result<(), ApiError> {
        match self.0.shift_remove(name) {
            Some(value) if !value.is_null() && value != *usual => {
                Err(ApiError::value(name, format!("only {usual} is supported")))
            }
            _ => Ok(()),
        }
    }

    /// # Errors
    /// The name of a field that nobody has taken.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::value(name, "there is no such field")),
        }
    }
}
