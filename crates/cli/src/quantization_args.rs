//! The arguments of the verbs without a recipe that hold the base in fewer bits.

use enamel_model::Quantization;
use enamel_train::recipe::{FourBitType, QuantizationSettings};

/// How the base's linear layers are held, named as the recipe's settings.
#[derive(clap::Args)]
pub struct QuantizationArgs {
    /// Hold the base's linear layers in 4 bits, in blocks of 64
    #[arg(long, conflicts_with = "load_in_8bit")]
    load_in_4bit: bool,
    /// What the 4-bit codes stand for: nf4 or fp4
    #[arg(long, value_name = "TYPE", default_value = "nf4", requires = "load_in_4bit",
          value_parser = ["nf4", "fp4"])]
    bnb_4bit_quant_type: String,
    /// Quantise the blocks' scales too
    #[arg(long, requires = "load_in_4bit")]
    bnb_4bit_use_double_quant: bool,
    /// Hold the base's linear layers in 8 bits, a scale for each row
    #[arg(long)]
    load_in_8bit: bool,
    /// Hold dense what is quantised in the model's files
    #[arg(long, conflicts_with_all = ["load_in_4bit", "load_in_8bit"])]
    dequantize: bool,
}

impl QuantizationArgs {
    /// Whether any of them is given.
    pub fn is_given(&self) -> bool {
        self.load_in_4bit || self.load_in_8bit || self.dequantize
    }

    /// What is to become of the linear layers.
    pub fn quantization(&self) -> Quantization {
        Quantization::from(&QuantizationSettings {
            load_in_4bit: self.load_in_4bit,
            bnb_4bit_quant_type: match self.bnb_4bit_quant_type.as_str() {
                "fp4" => FourBitType::Fp4,
                _ => FourBitType::Nf4,
            },
            bnb_4bit_use_double_quant: self.bnb_4bit_use_double_quant,
            load_in_8bit: self.load_in_8bit,
            dequantize: self.dequantize,
            ..QuantizationSettings::default()
        })
    }
}
