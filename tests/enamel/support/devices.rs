//! One test body, every device that a plain machine has.

use burn::tensor::Device;

/// The device of a test module's name.
pub fn device(name: &str) -> Device {
    match name {
        "flex" => Device::flex(),
        // Deprecated in Burn 0.22, and one of the two backends that parity is promised on.
        #[allow(deprecated)]
        "ndarray" => Device::ndarray(),
        _ => panic!("no device {name}"),
    }
}

/// Makes `flex::name` and `ndarray::name` of each `fn name(device: &Device)`.
#[macro_export]
macro_rules! on_every_device {
    ($($name:ident),+ $(,)?) => {
        mod flex {
            $(#[test] fn $name() { super::$name(&$crate::support::devices::device("flex")); })+
        }
        mod ndarray {
            $(#[test] fn $name() { super::$name(&$crate::support::devices::device("ndarray")); })+
        }
    };
}
