//! Zip archives with every field open to changes.

use crate::mutate;
use crate::random::Random;

#[derive(Clone)]
pub struct Entry {
    pub name: String,
    /// 0 is stored, 8 deflated.
    pub method: u16,
    pub crc: u32,
    pub size: u64,
    pub data: Vec<u8>,
}

/// An entry whose bytes stand as they are.
pub fn stored(name: &str, data: &[u8]) -> Entry {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    Entry {
        name: name.to_owned(),
        method: 0,
        crc: !crc,
        size: data.len() as u64,
        data: data.to_vec(),
    }
}

/// The same deflated, in the form that compresses nothing: blocks of bytes as they are.
pub fn deflated(name: &str, data: &[u8]) -> Entry {
    let mut packed = Vec::new();
    let mut chunks = data.chunks(64).peekable();
    while let Some(chunk) = chunks.next() {
        packed.push(u8::from(chunks.peek().is_none()));
        packed.extend((chunk.len() as u16).to_le_bytes());
        packed.extend((!(chunk.len() as u16)).to_le_bytes());
        packed.extend(chunk);
    }
    Entry {
        method: 8,
        data: packed,
        ..stored(name, data)
    }
}

/// Fields of one entry's headers, as they are unless changed.
struct Fields {
    flags: u16,
    method: u16,
    crc: u32,
    packed: u32,
    size: u32,
    offset: u32,
    extra: Vec<u8>,
    signature: u32,
}

/// An archive with some things changed.
pub fn changed(random: &mut Random, entries: &[Entry]) -> Vec<u8> {
    let mut entries = entries.to_vec();
    for _ in 0..random.below(3) {
        entry(random, &mut entries);
    }
    let mut bytes = vec![
        b'x';
        if random.once_in(12) {
            random.below(64)
        } else {
            0
        }
    ];
    let mut central = Vec::new();
    let faulty = random.below(2 * entries.len() + 1);
    for (index, entry) in entries.iter().enumerate() {
        let mut fields = Fields {
            flags: 0,
            method: entry.method,
            crc: entry.crc,
            packed: entry.data.len() as u32,
            size: entry.size as u32,
            offset: bytes.len() as u32,
            extra: Vec::new(),
            signature: 0x0403_4B50,
        };
        let mut local_only = false;
        if index == faulty {
            fault(random, &mut fields);
            local_only = random.once_in(3);
        }
        header(&mut bytes, &fields, &entry.name, false);
        bytes.extend(&entry.data);
        if local_only {
            fields.extra.clear();
        }
        fields.signature = 0x0201_4B50;
        header(&mut central, &fields, &entry.name, true);
    }
    let start = bytes.len() as u32;
    let length = central.len() as u32;
    bytes.extend(central);
    if random.once_in(6) {
        end64(
            random,
            &mut bytes,
            entries.len() as u64,
            u64::from(length),
            u64::from(start),
        );
    }
    let mut count = entries.len() as u16;
    let (mut start, mut length) = (start, length);
    match random.below(12) {
        0 => count = mutate::number(random, count.into()) as u16,
        1 => start = mutate::number(random, start.into()) as u32,
        2 => length = mutate::number(random, length.into()) as u32,
        _ => {}
    }
    bytes.extend(0x0605_4B50u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(start.to_le_bytes());
    let comment = if random.once_in(8) {
        random.below(40)
    } else {
        0
    };
    bytes.extend((comment as u16).to_le_bytes());
    bytes.extend(std::iter::repeat_n(b'P', comment));
    if random.once_in(4) {
        mutate::bytes(random, &mut bytes);
    }
    bytes
}

fn header(out: &mut Vec<u8>, fields: &Fields, name: &str, central: bool) {
    out.extend(fields.signature.to_le_bytes());
    if central {
        out.extend(0x031Eu16.to_le_bytes());
    }
    out.extend(20u16.to_le_bytes());
    out.extend(fields.flags.to_le_bytes());
    out.extend(fields.method.to_le_bytes());
    out.extend([0; 4]);
    out.extend(fields.crc.to_le_bytes());
    out.extend(fields.packed.to_le_bytes());
    out.extend(fields.size.to_le_bytes());
    out.extend((name.len() as u16).to_le_bytes());
    out.extend((fields.extra.len() as u16).to_le_bytes());
    if central {
        out.extend([0; 10]);
        out.extend(fields.offset.to_le_bytes());
    }
    out.extend(name.as_bytes());
    out.extend(&fields.extra);
}

/// The records of archives past four gigabytes.
fn end64(random: &mut Random, bytes: &mut Vec<u8>, count: u64, length: u64, start: u64) {
    let at = bytes.len() as u64;
    let mut fields = [44, count, count, length, start, at];
    if random.once_in(2) {
        let place = random.below(fields.len());
        fields[place] = mutate::number(random, fields[place]);
    }
    bytes.extend(0x0606_4B50u32.to_le_bytes());
    bytes.extend(fields[0].to_le_bytes());
    bytes.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    fields[1..5]
        .iter()
        .for_each(|field| bytes.extend(field.to_le_bytes()));
    bytes.extend(0x0706_4B50u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(fields[5].to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
}

fn fault(random: &mut Random, fields: &mut Fields) {
    match random.below(8) {
        0 => fields.flags = *random.pick(&[1, 8, 0x40, 0x800, 0xFFFF]),
        1 => fields.method = *random.pick(&[0, 1, 6, 8, 9, 12, 14, 93, 95, 99, 0xFFFF]),
        2 => fields.crc ^= 1 << random.below(32),
        3 => fields.packed = mutate::number(random, fields.packed.into()) as u32,
        4 => fields.size = mutate::number(random, fields.size.into()) as u32,
        5 => fields.offset = mutate::number(random, fields.offset.into()) as u32,
        6 => fields.signature ^= 1 << random.below(32),
        _ => {
            // Zip64, Unicode path, AES, time: an id, a length, and so many bytes or not.
            let id: u16 = *random.pick(&[1, 0x7075, 0x9901, 0x5455, 0xFFFF]);
            let length = random.below(40) as u16;
            fields.extra.extend(id.to_le_bytes());
            fields.extra.extend(length.to_le_bytes());
            let own = if random.once_in(3) {
                random.below(40)
            } else {
                length.into()
            };
            fields.extra.extend((0..own).map(|_| random.next() as u8));
            if random.once_in(2) {
                (fields.size, fields.packed) = (u32::MAX, u32::MAX);
            }
        }
    }
}

fn entry(random: &mut Random, entries: &mut Vec<Entry>) {
    let at = random.below(entries.len());
    let Some(entry) = entries.get_mut(at) else {
        return;
    };
    match random.below(7) {
        0 => {
            let copy = entry.clone();
            entries.push(copy);
        }
        1 => {
            entries.remove(at);
        }
        2 => {
            let names = [
                "../model.gguf",
                "/model.gguf",
                "a/b/../model.gguf",
                "model.gguf/",
                "",
                "model.gguf\0",
                "é",
            ];
            entry.name = (*random.pick(&names)).to_owned();
        }
        3 => mutate::bytes(random, &mut entry.data),
        4 => entry.method = *random.pick(&[0, 8]),
        5 => entry.data.truncate(entry.data.len() / 2),
        _ => entry.size = mutate::number(random, entry.size),
    }
}
