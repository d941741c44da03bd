//! The one place that names a backend for selection: `device = "auto" | "flex" | "ndarray" |
//! "cuda" | "cuda:N" | "wgpu"`.

use burn::tensor::Device;
pub use enamel_kernels::CPU_VARIABLE;
use enamel_kernels::CpuPath;

use crate::error::{CpuPathAbsent, TrainError};

/// A compute device as a person asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device, else a wgpu device, else Flex.
    Auto,
    /// Burn's Flex backend, on the CPU.
    Flex,
    /// Burn's NdArray backend, on the CPU.
    NdArray,
    /// A CUDA device by index.
    Cuda(usize),
    /// The default wgpu device.
    Wgpu,
}

/// What the names are, for messages.
pub const FORMS: &str = "auto, flex, ndarray, cuda, cuda:N, wgpu";

impl std::str::FromStr for DeviceChoice {
    type Err = TrainError;

    fn from_str(s: &str) -> Result<Self, TrainError> {
        let unknown = || TrainError::UnknownDevice {
            asked: s.to_string(),
            forms: FORMS,
        };
        match s {
            "auto" => Ok(Self::Auto),
            "flex" | "cpu" => Ok(Self::Flex),
            "ndarray" => Ok(Self::NdArray),
            "cuda" => Ok(Self::Cuda(0)),
            "wgpu" => Ok(Self::Wgpu),
            _ => match s.strip_prefix("cuda:") {
                Some(n) => n.parse().map(Self::Cuda).map_err(|_| unknown()),
                None => Err(unknown()),
            },
        }
    }
}

impl DeviceChoice {
    /// The CPU path that computes, on a CPU.
    pub fn cpu_path(self) -> Option<&'static str> {
        matches!(self, Self::Flex | Self::NdArray).then(|| CpuPath::chosen().name())
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Flex => f.write_str("flex"),
            Self::NdArray => f.write_str("ndarray"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Wgpu => f.write_str("wgpu"),
        }
    }
}

/// One line of `enamel devices`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What to write in `device = "…"`.
    pub name: String,
    /// Whether this build contains the backend.
    pub compiled: bool,
    /// Whether such a device was found.
    pub present: bool,
    /// Total memory in bytes, where the system tells.
    pub memory: Option<u64>,
    /// What it is, or why it is not there.
    pub note: String,
}

/// Which instructions compute on a CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    /// The path in use; an error where `ENAMEL_CPU` names none of this machine's.
    pub path: Result<&'static str, CpuPathAbsent>,
    /// Whether `ENAMEL_CPU` decided it.
    pub asked: bool,
    /// The paths of this machine, the plainest first.
    pub available: Vec<&'static str>,
    /// The instructions that multiply bf16; none where bf16 weights are multiplied in f32.
    pub bf16_products: Option<&'static str>,
}

/// The CPU path in use and those there are.
pub fn cpu() -> CpuInfo {
    let available = CpuPath::available();
    cpu_info(CpuPath::asked(), CpuPath::chosen(), available)
}

fn cpu_info(
    asked: Option<Result<CpuPath, String>>,
    chosen: CpuPath,
    available: &[CpuPath],
) -> CpuInfo {
    let available: Vec<_> = available.iter().map(|path| path.name()).collect();
    CpuInfo {
        asked: asked.is_some(),
        bf16_products: chosen.bf16_products(),
        path: match asked {
            Some(Err(asked)) => Err(CpuPathAbsent {
                asked,
                available: available.clone(),
            }),
            _ => Ok(chosen.name()),
        },
        available,
    }
}

/// Refuses to compute while `ENAMEL_CPU` asks for what this machine has not: whoever compares paths
/// would compare the best one with itself.
///
/// # Errors
/// That, with the paths there are.
pub fn check_cpu() -> Result<(), TrainError> {
    cpu().path?;
    Ok(())
}

/// Every device that this version knows of: compiled in or not, present or not.
pub fn list() -> Vec<DeviceInfo> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let ram = Some(system.total_memory()).filter(|m| *m > 0);
    let threads = rayon::current_num_threads();
    let mut devices = vec![
        DeviceInfo {
            name: "flex".into(),
            compiled: true,
            present: true,
            memory: ram,
            note: match cpu().path {
                Ok(path) => format!("CPU, {threads} threads, {path} kernels"),
                Err(_) => format!("CPU, {threads} threads"),
            },
        },
        DeviceInfo {
            name: "ndarray".into(),
            compiled: true,
            present: true,
            memory: ram,
            note: "CPU, plain Burn operations (slower; for comparison)".into(),
        },
    ];
    devices.extend(cuda_devices());
    devices.extend(wgpu_devices());
    devices
}

fn absent(name: &str, compiled: bool, note: &str) -> DeviceInfo {
    DeviceInfo {
        name: name.into(),
        compiled,
        present: false,
        memory: None,
        note: note.into(),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda_devices() -> Vec<DeviceInfo> {
    vec![absent(
        "cuda",
        false,
        "not in this build: cargo build --release --features cuda",
    )]
}

#[cfg(feature = "cuda")]
fn cuda_devices() -> Vec<DeviceInfo> {
    let count = Device::enumerate(burn::tensor::DeviceType::Cuda)
        .into_vec()
        .len();
    if count == 0 {
        return vec![absent("cuda", true, "no CUDA device or driver found")];
    }
    let nvml = nvml_wrapper::Nvml::init().ok();
    (0..count)
        .map(|index| {
            let card = nvml
                .as_ref()
                .zip(u32::try_from(index).ok())
                .and_then(|(n, i)| n.device_by_index(i).ok());
            DeviceInfo {
                name: format!("cuda:{index}"),
                compiled: true,
                present: true,
                memory: card
                    .as_ref()
                    .and_then(|c| c.memory_info().ok())
                    .map(|m| m.total),
                note: card
                    .and_then(|c| c.name().ok())
                    .unwrap_or_else(|| "CUDA device".into()),
            }
        })
        .collect()
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_devices() -> Vec<DeviceInfo> {
    vec![absent(
        "wgpu",
        false,
        "not in this build: cargo build --release --features wgpu",
    )]
}

#[cfg(feature = "wgpu")]
fn wgpu_devices() -> Vec<DeviceInfo> {
    let found = Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec();
    match found.first() {
        None => vec![absent("wgpu", true, "no adapter found")],
        Some(device) => vec![DeviceInfo {
            name: "wgpu".into(),
            compiled: true,
            present: true,
            memory: None,
            note: device
                .identity()
                .map_or_else(|| "wgpu adapter".into(), |i| i.name),
        }],
    }
}

/// The Burn device for a choice, and the concrete choice that `auto` came to.
///
/// # Errors
/// A device that is not compiled in or not present is an error that lists those that are; so is a CPU
/// path of `ENAMEL_CPU` that is not there.
pub fn open(choice: DeviceChoice) -> Result<(Device, DeviceChoice), TrainError> {
    check_cpu()?;
    let devices = list();
    let present = |name: &str| devices.iter().any(|d| d.present && d.name == name);
    let concrete = match choice {
        DeviceChoice::Auto if present("cuda:0") => DeviceChoice::Cuda(0),
        DeviceChoice::Auto if present("wgpu") => DeviceChoice::Wgpu,
        DeviceChoice::Auto => DeviceChoice::Flex,
        other => other,
    };
    let name = concrete.to_string();
    if !present(&name) {
        let family = name.split(':').next().unwrap_or(&name);
        let why = devices
            .iter()
            .find(|d| d.name == name || (d.name == family && !d.present))
            .map_or_else(|| "there is no such device".to_string(), |d| d.note.clone());
        return Err(TrainError::DeviceAbsent {
            asked: choice.to_string(),
            why,
            present: devices
                .into_iter()
                .filter(|d| d.present)
                .map(|d| d.name)
                .collect(),
        });
    }
    Ok((construct(concrete), concrete))
}

#[allow(deprecated)] // NdArray is deprecated in Burn 0.22 and still part of what we offer.
fn construct(choice: DeviceChoice) -> Device {
    match choice {
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(index) => Device::cuda(index),
        #[cfg(feature = "wgpu")]
        DeviceChoice::Wgpu => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        DeviceChoice::NdArray => Device::ndarray(),
        // `open` lets nothing through that is not compiled in.
        _ => Device::flex(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_print() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("flex", DeviceChoice::Flex),
            ("ndarray", DeviceChoice::NdArray),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
            ("wgpu", DeviceChoice::Wgpu),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string().parse::<DeviceChoice>().unwrap(), choice);
        }
        let error = "cuda:x".parse::<DeviceChoice>().unwrap_err().to_string();
        assert!(
            error.contains("cuda:x") && error.contains("ndarray"),
            "{error}"
        );
    }

    #[test]
    fn a_path_that_is_not_there_is_an_error_that_lists_the_others() {
        use CpuPath::{Avx2, Portable, Reference};
        let here = [Reference, Portable, Avx2];
        let absent = cpu_info(Some(Err("amx".into())), Avx2, &here);
        assert_eq!(
            absent.path.unwrap_err().to_string(),
            "ENAMEL_CPU=amx: this machine has reference, portable, avx2; unset it or name one of these"
        );
        let asked = cpu_info(Some(Ok(Portable)), Portable, &here);
        assert_eq!((asked.path, asked.asked), (Ok("portable"), true));
        let free = cpu_info(None, Avx2, &here);
        assert_eq!((free.path, free.asked), (Ok("avx2"), false));
    }

    #[test]
    fn bf16_is_multiplied_where_there_are_instructions_for_it() {
        let info = |path| cpu_info(None, path, &CpuPath::ALL).bf16_products;
        assert_eq!(info(CpuPath::Amx), Some("amx"));
        assert_eq!(info(CpuPath::Avx512Bf16), Some("avx512bf16"));
        assert_eq!(info(CpuPath::Avx512), None);
    }

    #[test]
    fn an_absent_device_is_an_error_that_lists_the_others() {
        let error = open(DeviceChoice::Cuda(97)).unwrap_err().to_string();
        assert!(
            error.contains("cuda:97") && error.contains("flex"),
            "{error}"
        );
    }
}
