//! What the tests share.

pub(crate) mod adapted;
pub(crate) mod curves;
pub(crate) mod devices;
pub(crate) mod enamel_process;
pub(crate) mod goldens;
#[cfg(unix)]
pub(crate) mod pseudo_terminal;
pub(crate) mod several;
