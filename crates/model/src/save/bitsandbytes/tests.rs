//! What is written is read back as it was quantised.

use std::path::PathBuf;

use enamel_kernels::quant::FourBit;

use super::*;

fn source() -> Checkpoint {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama/untied");
    Checkpoint::open(&path).unwrap()
}

fn four(kind: FourBit, double: bool) -> Format {
    Format::FourBit {
        kind,
        block: 32,
        double,
        compute: FloatKind::F32,
    }
}

#[test]
fn every_format_is_read_back_with_the_same_codes_and_scales_in_any_sharding() {
    let dir = tempfile::tempdir().unwrap();
    let source = source();
    let skip = "model.layers.1.mlp";
    for (i, format) in [
        four(FourBit::Nf4, false),
        four(FourBit::Nf4, true),
        four(FourBit::Fp4, true),
        Format::Int8 { threshold: 5.0 },
    ]
    .into_iter()
    .enumerate()
    {
        let quantization = Quantization {
            format: Some(format),
            skip_modules: vec![skip.to_owned()],
            dequantize: false,
        };
        for shard_bytes in [1 << 30, 5000] {
            let to = dir.path().join(format!("{i}-{shard_bytes}"));
            let options = SaveOptions {
                shard_bytes,
                ..SaveOptions::new(SaveDtype::F32)
            };
            let saved = write_bitsandbytes(&to, &source, &quantization, &options).unwrap();
            assert_eq!(saved.quantised, 14 - 3);
            assert_eq!(saved.saved.files.len() > 5, shard_bytes == 5000);
            let back = Checkpoint::open(&to).unwrap();
            let mut names: Vec<_> = source
                .tensors()
                .iter()
                .map(|t| (&t.name, &t.shape))
                .collect();
            let mut found: Vec<_> = back.tensors().iter().map(|t| (&t.name, &t.shape)).collect();
            names.sort();
            found.sort();
            assert_eq!(found, names);
            let config = LlamaConfig::from_json(back.config_json()).unwrap();
            for module in config.modules() {
                let name = format!("{}.weight", module.name);
                let packed = back.read_packed(&name).unwrap();
                let linear = module.kind == enamel_adapter::ModuleKind::Linear;
                if !linear || module.name.starts_with(skip) {
                    assert!(packed.is_none(), "{name}");
                    assert_eq!(
                        back.read_f32(&name).unwrap(),
                        source.read_f32(&name).unwrap()
                    );
                    continue;
                }
                let flex = Device::flex();
                let own = quantization
                    .pack(&source, &module.name, Compute::F32, &flex)
                    .unwrap();
                assert!(packed.as_ref() == Some(own.unwrap().rows()), "{name}");
            }
        }
    }
}

#[test]
fn what_is_there_is_kept_and_nothing_is_written_that_cannot_be_quantised() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("model");
    fs::create_dir(&to).unwrap();
    fs::write(to.join("mine"), "kept").unwrap();
    let options = SaveOptions::new(SaveDtype::F32);
    let with = |format, skip: &[&str]| Quantization {
        format: Some(format),
        skip_modules: skip.iter().map(|s| (*s).to_owned()).collect(),
        dequantize: false,
    };
    let nf4 = four(FourBit::Nf4, false);
    let error = write_bitsandbytes(&to, &source(), &with(nf4, &[]), &options).unwrap_err();
    assert!(matches!(error, SaveError::Exists(_)), "{error}");
    assert_eq!(fs::read_to_string(to.join("mine")).unwrap(), "kept");

    let other = dir.path().join("other");
    let error = write_bitsandbytes(&other, &source(), &with(nf4, &["down_porj"]), &options);
    assert!(error.unwrap_err().to_string().contains("down_proj"));
    let large = Format::FourBit {
        kind: FourBit::Nf4,
        block: 4096,
        double: false,
        compute: FloatKind::F32,
    };
    let error = write_bitsandbytes(&other, &source(), &with(large, &[]), &options).unwrap_err();
    assert!(error.to_string().contains("q_proj"), "{error}");
    assert!(!other.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
