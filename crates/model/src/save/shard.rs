//! One safetensors file, written tensor by tensor in one pass.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{SaveError, io};

/// Element types that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PartType {
    F32,
    F16,
    BF16,
    U8,
    I8,
}

impl PartType {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::U8 => "U8",
            Self::I8 => "I8",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 | Self::I8 => 1,
        }
    }
}

/// A tensor of the file.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub name: String,
    pub dtype: PartType,
    /// Of an open one, the most bytes that it may have.
    pub shape: Vec<usize>,
    /// Whether its length is known only when it is written.
    pub open: bool,
}

impl Part {
    fn bytes(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product::<u64>() * self.dtype.bytes()
    }
}

/// Tensors that are written together and lie in one file.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// The model's tensor that they stand for.
    pub name: String,
    pub parts: Vec<Part>,
}

impl Group {
    /// One tensor as it is.
    pub fn dense(name: &str, shape: &[usize], dtype: PartType) -> Self {
        let part = Part {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            open: false,
        };
        Self {
            name: name.to_owned(),
            parts: vec![part],
        }
    }

    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Part::bytes).sum()
    }
}

/// A part and where it lies behind the header.
struct Place {
    part: Part,
    at: u64,
}

/// A file under way. Wider elements lie before narrower ones, so that all are aligned; what has no length yet
/// comes last.
pub(super) struct Shard {
    path: PathBuf,
    out: BufWriter<File>,
    places: Vec<Place>,
    /// Where the next byte goes in the file.
    position: u64,
    /// Bytes that are kept for the header.
    room: usize,
    /// Where the next open part goes.
    end: u64,
}

impl Shard {
    pub fn create(path: &Path, groups: &[Group]) -> Result<Self, SaveError> {
        let mut parts: Vec<Part> = groups.iter().flat_map(|g| g.parts.clone()).collect();
        parts.sort_by_key(|part| (part.open, std::cmp::Reverse(part.dtype.bytes())));
        let (mut at, mut end) = (0, 0);
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            let next = at + part.bytes();
            if !part.open {
                end = next;
            }
            places.push(Place { part, at });
            at = next;
        }
        // Open parts are at their longest here, so no number of the final header has more digits.
        let room = header(&places).len().next_multiple_of(8);
        let file = File::create(path).map_err(io(path))?;
        Ok(Self {
            path: path.to_owned(),
            out: BufWriter::with_capacity(1 << 20, file),
            places,
            position: 0,
            room,
            end,
        })
    }

    /// The shape of a tensor; that of a vector without elements if there is none of the name.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        let place = self.places.iter().find(|place| place.part.name == name);
        place.map_or_else(|| vec![0], |place| place.part.shape.clone())
    }

    /// Turns to the place of a tensor, whose bytes are written next.
    pub fn begin(&mut self, name: &str) -> Result<(), SaveError> {
        let place = self.places.iter().find(|place| place.part.name == name);
        let at = place.map(|place| place.at).ok_or_else(|| {
            io(&self.path)(std::io::Error::other(format!("no place for '{name}'")))
        })?;
        self.seek(8 + self.room as u64 + at)
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes).map_err(io(&self.path))
    }

    /// Writes a whole tensor.
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        let end = self.end;
        let place = self.places.iter_mut().find(|p| p.part.name == name);
        let fits = place.is_some_and(|place| {
            let most = place.part.bytes();
            if place.part.open && bytes.len() as u64 <= most {
                place.at = end;
                place.part.shape = vec![bytes.len()];
                self.end += bytes.len() as u64;
                return true;
            }
            bytes.len() as u64 == most
        });
        if !fits {
            return Err(SaveError::WrongLength {
                name: name.to_owned(),
                shape: self.shape(name),
                found: bytes.len(),
            });
        }
        self.begin(name)?;
        self.write(bytes)
    }

    /// Writes the header and gives the bytes of all tensors.
    pub fn finish(mut self) -> Result<u64, SaveError> {
        self.places.sort_by_key(|place| place.at);
        let mut text = header(&self.places);
        // Spaces up to a multiple of eight align the data.
        text.resize(self.room, b' ');
        self.seek(0)?;
        self.write(&(text.len() as u64).to_le_bytes())?;
        self.write(&text)?;
        let path = self.path;
        let file = self
            .out
            .into_inner()
            .map_err(|e| io(&path)(e.into_error()))?;
        file.sync_all().map_err(io(&path))?;
        Ok(self.places.iter().map(|place| place.part.bytes()).sum())
    }

    fn seek(&mut self, to: u64) -> Result<(), SaveError> {
        // Seeking empties the buffer, which pieces in a row need not.
        if self.position != to {
            self.out.seek(SeekFrom::Start(to)).map_err(io(&self.path))?;
            self.position = to;
        }
        Ok(())
    }
}

fn header(places: &[Place]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    for Place { part, at } in places {
        header.insert(
            part.name.clone(),
            json!({
                "dtype": part.dtype.name(),
                "shape": part.shape,
                "data_offsets": [at, at + part.bytes()],
            }),
        );
    }
    Value::Object(header).to_string().into_bytes()
}
