//! What of a SentencePiece model file is needed here. Layout: `sentencepiece_model.proto` of its repository.

/// A piece of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Other,
}

/// A model, with the defaults of its format.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Model {
    pub pieces: Vec<Piece>,
    /// 1 unigram, 2 byte-pair encoding, 3 words, 4 characters.
    pub kind: u64,
    pub byte_fallback: bool,
    pub space_behind: bool,
    /// The piece's number and text; none where the number is negative.
    pub unk: (i64, String),
    pub bos: (i64, String),
    pub eos: (i64, String),
    pub charsmap: Vec<u8>,
    pub dummy_prefix: bool,
    pub remove_spaces: bool,
    pub escape_spaces: bool,
}

impl Model {
    /// Reads a model file.
    ///
    /// # Errors
    /// Where the file ends in the middle of something, or says something of another kind.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            kind: 1,
            byte_fallback: false,
            space_behind: false,
            unk: (0, "<unk>".to_owned()),
            bos: (1, "<s>".to_owned()),
            eos: (2, "</s>".to_owned()),
            charsmap: Vec::new(),
            dummy_prefix: true,
            remove_spaces: true,
            escape_spaces: true,
        };
        let mut fields = Fields { bytes };
        while let Some((number, field)) = fields.next()? {
            match number {
                1 => {
                    let piece = Piece::read(field.bytes("pieces")?);
                    let at = model.pieces.len();
                    model
                        .pieces
                        .push(piece.map_err(|e| format!("piece {at}: {e}"))?);
                }
                2 => model.trainer(field.bytes("trainer_spec")?)?,
                3 => model.normalizer(field.bytes("normalizer_spec")?)?,
                _ => {}
            }
        }
        match model.pieces.is_empty() {
            true => Err("it has no pieces".to_owned()),
            false => Ok(model),
        }
    }

    fn trainer(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields { bytes };
        while let Some((number, field)) = fields.next()? {
            let [unk, bos, eos] = [&mut self.unk, &mut self.bos, &mut self.eos];
            match number {
                3 => self.kind = field.number("model_type")?,
                24 => self.space_behind = field.number("treat_whitespace_as_suffix")? != 0,
                35 => self.byte_fallback = field.number("byte_fallback")? != 0,
                // Negative numbers are written with the sign's bits in front.
                40 => unk.0 = field.number("unk_id")?.cast_signed(),
                41 => bos.0 = field.number("bos_id")?.cast_signed(),
                42 => eos.0 = field.number("eos_id")?.cast_signed(),
                45 => unk.1 = field.text("unk_piece")?,
                46 => bos.1 = field.text("bos_piece")?,
                47 => eos.1 = field.text("eos_piece")?,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields { bytes };
        while let Some((number, field)) = fields.next()? {
            match number {
                2 => self.charsmap = field.bytes("precompiled_charsmap")?.to_vec(),
                3 => self.dummy_prefix = field.number("add_dummy_prefix")? != 0,
                4 => self.remove_spaces = field.number("remove_extra_whitespaces")? != 0,
                5 => self.escape_spaces = field.number("escape_whitespaces")? != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Piece {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let (mut text, mut score, mut kind) = (String::new(), 0.0, Kind::Normal);
        let mut fields = Fields { bytes };
        while let Some((number, field)) = fields.next()? {
            match number {
                1 => text = field.text("piece")?,
                2 => score = field.float("score")?,
                3 => {
                    kind = match field.number("type")? {
                        1 => Kind::Normal,
                        2 => Kind::Unknown,
                        3 => Kind::Control,
                        4 => Kind::UserDefined,
                        _ => Kind::Other,
                    };
                }
                _ => {}
            }
        }
        Ok(Self { text, score, kind })
    }
}

/// A field's value as Protocol Buffers write it.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Four([u8; 4]),
    Eight,
}

impl<'a> Field<'a> {
    fn number(&self, name: &str) -> Result<u64, String> {
        match self {
            Self::Number(n) => Ok(*n),
            _ => Err(format!("{name} is not a number")),
        }
    }

    fn bytes(&self, name: &str) -> Result<&'a [u8], String> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(format!("{name} is of another kind")),
        }
    }

    fn text(&self, name: &str) -> Result<String, String> {
        let text = String::from_utf8(self.bytes(name)?.to_vec());
        text.map_err(|_| format!("{name} is not UTF-8"))
    }

    fn float(&self, name: &str) -> Result<f32, String> {
        match self {
            Self::Four(bytes) => Ok(f32::from_le_bytes(*bytes)).and_then(|x| match x.is_finite() {
                true => Ok(x),
                false => Err(format!("{name} is {x}")),
            }),
            _ => Err(format!("{name} is not a number with a point")),
        }
    }
}

/// The fields of a message, one after the other.
struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => {
                self.take::<8>()?;
                Field::Eight
            }
            2 => {
                let length = self.varint()?;
                let split = usize::try_from(length)
                    .ok()
                    .and_then(|n| self.bytes.split_at_checked(n));
                let (bytes, rest) = split.ok_or("it ends in the middle of a field")?;
                self.bytes = rest;
                Field::Bytes(bytes)
            }
            5 => Field::Four(self.take()?),
            other => return Err(format!("it has a field of the unknown kind {other}")),
        };
        Ok(Some((tag >> 3, field)))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (bytes, rest) = self
            .bytes
            .split_first_chunk()
            .ok_or("it ends in the middle of a number")?;
        self.bytes = rest;
        Ok(*bytes)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let [byte] = self.take()?;
            value |= u64::from(byte & 0x7F).wrapping_shl(shift);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("it has a number of more than 64 bits".to_owned())
    }
}
