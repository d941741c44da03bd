//! What a run's numbers were computed by: where that is another, the bits are others, too.

use std::path::Path;

use enamel_kernels::{CPU_VARIABLE, CpuPath};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::recipe::{ComputeDtype, LockInfo};

/// Device, instructions and versions. The number of threads is none of it: it changes no bit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ground {
    /// Version of Enamel.
    pub enamel: String,
    /// Version of Burn.
    pub burn: String,
    /// The device, as `enamel devices` names it.
    pub device: String,
    /// The CPU path in use, on a CPU.
    pub cpu: Option<String>,
    /// Operating system and processor architecture.
    pub platform: String,
}

impl From<&LockInfo> for Ground {
    fn from(lock: &LockInfo) -> Self {
        Self {
            enamel: lock.enamel.clone(),
            burn: lock.burn.clone(),
            device: lock.device.clone(),
            cpu: lock.cpu.clone(),
            platform: lock.platform.clone(),
        }
    }
}

impl Ground {
    /// What is not as it was then and decides the bits of products in `compute`, a line each.
    fn differences(&self, now: &Self, compute: ComputeDtype) -> Vec<String> {
        // One card is as good as another, as far as can be told.
        let family = |device: &str| device.split(':').next().unwrap_or_default().to_owned();
        let mut found = Vec::new();
        let mut compare = |what: &str, then: &str, now: &str| {
            if then != now {
                found.push(format!("{what} {then} then, {now} now"));
            }
        };
        compare("Enamel", &self.enamel, &now.enamel);
        compare("Burn", &self.burn, &now.burn);
        compare("device", &family(&self.device), &family(&now.device));
        compare("platform", &self.platform, &now.platform);
        if let (Some(then), Some(now)) = (&self.cpu, &now.cpu)
            && same_sums(then, compute) != same_sums(now, compute)
        {
            let here = CpuPath::available().iter().any(|path| path.name() == then);
            let again = match here {
                true => format!(" ({CPU_VARIABLE}={then} computes as then)"),
                false => " (which this machine has not)".to_owned(),
            };
            found.push(format!("CPU path {then} then{again}, {now} now"));
        }
        found
    }
}

/// A name for the paths that give the same bits as `path`: those above AVX-512 differ from it in products of
/// bf16 only.
fn same_sums(path: &str, compute: ComputeDtype) -> &str {
    let widened = [CpuPath::Avx512Bf16, CpuPath::Amx];
    match compute {
        ComputeDtype::F32 if widened.iter().any(|wide| wide.name() == path) => {
            CpuPath::Avx512.name()
        }
        _ => path,
    }
}

/// Refuses to go on from a checkpoint whose numbers come from elsewhere, unless `accept`; then what there is to
/// know about it.
///
/// # Errors
/// That, with all that differs.
pub(crate) fn check(
    checkpoint: &Path,
    then: Option<&Ground>,
    now: &Ground,
    compute: ComputeDtype,
    accept: bool,
) -> Result<Option<String>, TrainError> {
    let found = then.map_or(Vec::new(), |then| then.differences(now, compute));
    if found.is_empty() {
        return Ok(None);
    }
    if accept {
        return Ok(Some(format!(
            "from here on other bits than an uninterrupted run's: {}",
            found.join("; ")
        )));
    }
    Err(TrainError::Run {
        path: checkpoint.to_owned(),
        reason: format!(
            "it was computed by something else, which gives other bits; the result would not be an \
             uninterrupted run's:\n  {}",
            found.join("\n  ")
        ),
        help: "compute as then, or go on all the same with --other-bits".into(),
    })
}

/// What there is to know where a lock file was written on other ground: it promises the same bits.
pub(crate) fn note_of_lock(
    locked: Option<&LockInfo>,
    now: &LockInfo,
    compute: ComputeDtype,
) -> Option<String> {
    let found = Ground::from(locked?).differences(&now.into(), compute);
    let all = found.join("; ");
    (!found.is_empty()).then(|| {
        format!("the adapter will not have the bits of the run that wrote the lock file: {all}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(cpu: &str) -> Ground {
        Ground {
            enamel: "1".into(),
            device: "flex".into(),
            cpu: Some(cpu.into()),
            ..Ground::default()
        }
    }

    #[test]
    fn paths_above_avx512_differ_in_bf16_alone() {
        let differ = |a, b, compute| !on(a).differences(&on(b), compute).is_empty();
        for (a, b, f32, bf16) in [
            ("avx512", "avx512bf16", false, true),
            ("amx", "avx512bf16", false, true),
            ("avx2", "avx512", true, true),
            ("portable", "reference", true, true),
            ("avx2", "avx2", false, false),
        ] {
            assert_eq!(differ(a, b, ComputeDtype::F32), f32, "{a} and {b} in f32");
            assert_eq!(
                differ(a, b, ComputeDtype::Bf16),
                bf16,
                "{a} and {b} in bf16"
            );
        }
    }

    #[test]
    fn all_that_differs_is_named_and_can_be_accepted() {
        let then = on("portable");
        let now = Ground {
            enamel: "2".into(),
            device: "cuda:1".into(),
            ..on("avx2")
        };
        let go_on = |accept| check(Path::new("c"), Some(&then), &now, ComputeDtype::F32, accept);
        let error = go_on(false).map_err(|e| e.to_string());
        let note = go_on(true).ok().flatten();
        for text in [error.as_ref().err(), note.as_ref()] {
            for part in [
                "Enamel 1 then, 2 now",
                "device flex then, cuda now",
                "ENAMEL_CPU=portable",
                "avx2 now",
            ] {
                assert!(
                    text.is_some_and(|text| text.contains(part)),
                    "{part}: {text:?}"
                );
            }
        }
        assert!(error.is_err_and(|e| e.contains("--other-bits")));
        // A checkpoint of an older version says nothing.
        assert!(
            check(Path::new("c"), None, &now, ComputeDtype::F32, false).is_ok_and(|n| n.is_none())
        );
    }
}
