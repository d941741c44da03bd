//! Quantisation against goldens written by bitsandbytes, and what it refuses.

use half::{bf16, f16};
use serde_json::Value;

use super::*;

fn golden() -> Value {
    serde_json::from_str(include_str!("../../../../../tests/fixtures/quant.json")).unwrap()
}

fn list<'a>(json: &'a Value, key: &str) -> &'a [Value] {
    json[key].as_array().unwrap()
}

fn bytes(json: &Value, key: &str) -> Vec<u8> {
    let text = json[key].as_str().unwrap_or_else(|| panic!("no {key}"));
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

/// Numbers of a dtype, widened.
fn numbers(json: &Value, key: &str, dtype: FloatKind) -> Vec<f32> {
    let bytes = bytes(json, key);
    let half = || bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match dtype {
        FloatKind::F32 => bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        FloatKind::Bf16 => half().map(|b| bf16::from_bits(b).to_f32()).collect(),
        FloatKind::F16 => half().map(|b| f16::from_bits(b).to_f32()).collect(),
    }
}

fn floats(json: &Value, key: &str) -> Vec<f32> {
    numbers(json, key, FloatKind::F32)
}

/// The same bits, signs of zeros included.
fn same(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert_eq!(g.to_bits(), w.to_bits(), "{what}: {i} is {g:e}, not {w:e}");
    }
}

const DTYPES: [FloatKind; 3] = [FloatKind::F32, FloatKind::Bf16, FloatKind::F16];

fn options(kind: FourBit, block: usize, double: bool) -> FourBitOptions {
    FourBitOptions {
        kind,
        block,
        double,
        ..FourBitOptions::default()
    }
}

#[test]
fn tables_are_bitsandbytes_own() {
    let golden = golden();
    for kind in [FourBit::Nf4, FourBit::Fp4] {
        same(
            kind.name(),
            kind.table(),
            &floats(&golden["tables"], kind.name()),
        );
    }
    same(
        "dynamic map",
        dynamic_map(),
        &floats(&golden, "dynamic_map"),
    );
}

#[test]
fn four_bit_weights_are_bitsandbytes_own() {
    let golden = golden();
    let cases = list(&golden, "four_bit");
    assert_eq!(cases.len(), 18);
    for case in cases {
        let text = case["state"].as_str().unwrap();
        let state = QuantState::parse(text.as_bytes()).unwrap();
        let options = FourBitOptions {
            kind: state.kind,
            block: state.block,
            double: state.nested.is_some(),
            dtype: state.dtype,
        };
        let values = numbers(case, "values", state.dtype);
        let made = FourBitTensor::quantise(&values, &state.shape, options).unwrap();
        assert_eq!(made.codes(), bytes(case, "codes"), "{text}");
        match made.absmax() {
            Absmax::Plain(scales) => same(text, scales, &floats(case, "absmax")),
            Absmax::Nested { blocks, offset } => {
                same(text, &[*offset], &floats(case, "nested_offset"));
                same(text, &blocks.absmax, &floats(case, "nested_absmax"));
                assert_eq!(blocks.codes, bytes(case, "absmax"), "{text}");
            }
        }
        assert_eq!(made.state(), state);
        assert_eq!(String::from_utf8(made.state().to_json()).unwrap(), text);
        let mut compared = 0;
        for dtype in DTYPES {
            if case.get(dtype.name()).is_some() {
                let mut want = numbers(case, dtype.name(), dtype);
                let mut got = made.dequantise(dtype);
                if state.kind == FourBit::Fp4 {
                    // Code 8 is 0 in some of bitsandbytes' kernels and -0 in others.
                    for zero in got.iter_mut().chain(&mut want).filter(|v| **v == 0.0) {
                        *zero = 0.0;
                    }
                }
                same(text, &got, &want);
                compared += 1;
            }
        }
        assert!(compared > 0);
        let again =
            FourBitTensor::from_parts(&state, bytes(case, "codes"), Some(made.absmax().clone()));
        assert_eq!(again.unwrap(), made);
    }
}

/// The order of the sum behind the offset shows from a few hundred blocks on.
#[test]
fn double_quantisation_of_many_blocks_is_bitsandbytes_own() {
    let golden = golden();
    let cases = list(&golden, "many");
    assert_eq!(cases.len(), 2);
    for case in cases {
        let kind = FourBit::from_name(case["type"].as_str().unwrap()).unwrap();
        let block = case["block"].as_u64().unwrap() as usize;
        let scales = floats(case, "scales");
        let values: Vec<f32> = scales.iter().flat_map(|&s| vec![s; block]).collect();
        let made =
            FourBitTensor::quantise(&values, &[values.len()], options(kind, block, true)).unwrap();
        let Absmax::Nested { blocks, offset } = made.absmax() else {
            panic!("not nested");
        };
        same("offset", &[*offset], &floats(case, "nested_offset"));
        same(
            "nested scales",
            &blocks.absmax,
            &floats(case, "nested_absmax"),
        );
        assert_eq!(blocks.codes, bytes(case, "absmax"));
        let got: Vec<f32> = (0..scales.len()).map(|b| made.absmax().scale(b)).collect();
        same("scales", &got, &floats(case, "dequantised"));
    }
}

#[test]
fn dynamic_blocks_are_bitsandbytes_own() {
    let golden = golden();
    let cases = list(&golden, "dynamic");
    assert_eq!(cases.len(), 4);
    for case in cases {
        let block = case["block"].as_u64().unwrap() as usize;
        let made = DynamicBlocks::quantise(&floats(case, "values"), block).unwrap();
        assert_eq!(made.codes, bytes(case, "codes"));
        same("scales", &made.absmax, &floats(case, "absmax"));
        same("values", &made.dequantise(), &floats(case, "dequantised"));
    }
}

#[test]
fn int8_rows_and_outliers_are_bitsandbytes_own() {
    let golden = golden();
    let cases = list(&golden, "int8");
    assert_eq!(cases.len(), 2);
    for case in cases {
        let values = floats(case, "values");
        let rows = case["rows"].as_u64().unwrap() as usize;
        let shape = [rows, values.len() / rows];
        let threshold = case["threshold"].as_f64().unwrap() as f32;
        let (made, outliers) = if threshold > 0.0 {
            quantise_activations(&values, shape, threshold).unwrap()
        } else {
            (Int8Rows::quantise(&values, shape).unwrap(), Vec::new())
        };
        let want: Vec<i8> = bytes(case, "codes").iter().map(|&b| b as i8).collect();
        assert_eq!(made.codes(), want);
        same("SCB", made.absmax(), &floats(case, "absmax"));
        let columns: Vec<usize> = list(case, "outliers")
            .iter()
            .map(|c| c.as_u64().unwrap() as usize)
            .collect();
        assert_eq!(outliers, columns);
        assert_eq!(columns.is_empty(), threshold == 0.0);
        for dtype in DTYPES {
            let all = made.dequantise(dtype);
            same("values", &all, &numbers(case, dtype.name(), dtype));
            let mut row = vec![0.0; shape[1]];
            made.dequantise_row(4, dtype, &mut row).unwrap();
            same("row", &row, &all[4 * shape[1]..5 * shape[1]]);
        }
    }
}

/// Numbers that are not random, of either sign.
fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin() * 0.05).collect()
}

#[test]
fn a_range_is_a_piece_of_the_whole() {
    let values = wave(40_001);
    let made =
        FourBitTensor::quantise(&values, &[40_001], options(FourBit::Nf4, 64, true)).unwrap();
    let all = made.dequantise(FloatKind::Bf16);
    for range in [0..40_001, 63..66, 129..20_003, 40_000..40_001, 7..7] {
        let mut out = vec![f32::NAN; range.len()];
        made.dequantise_range(range.clone(), FloatKind::Bf16, &mut out)
            .unwrap();
        same("range", &out, &all[range]);
    }
    let error = made.dequantise_range(40_000..40_002, FloatKind::F32, &mut [0.0; 2]);
    assert!(error.unwrap_err().to_string().contains("40000..40002"));
}

#[test]
fn threads_do_not_matter() {
    let values = wave(70_003);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let w = FourBitTensor::quantise(&values, &[70_003], options(FourBit::Fp4, 32, true));
            let w = w.unwrap();
            (
                w.dequantise(FloatKind::F32),
                w,
                Int8Rows::quantise(&values, [1, 70_003]).unwrap(),
            )
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn quantised_values_are_near_and_four_times_smaller_than_bf16() {
    let values = wave(64 * 1024);
    let w = FourBitTensor::quantise(&values, &[64, 1024], options(FourBit::Nf4, 64, true)).unwrap();
    for (v, d) in values.iter().zip(w.dequantise(FloatKind::F32)) {
        assert!((v - d).abs() < 0.05 * 0.16, "{v} {d}");
    }
    assert!(2 * values.len() > 37 * w.bytes() / 10);
}

#[test]
fn a_value_that_is_not_finite_is_named_by_its_position() {
    let mut values = wave(200);
    values[131] = f32::NAN;
    values[150] = f32::INFINITY;
    let error = FourBitTensor::quantise(&values, &[2, 100], FourBitOptions::default()).unwrap_err();
    assert!(
        error.to_string().contains("NaN at row-major position 131"),
        "{error}"
    );
    let error = Int8Rows::quantise(&values[140..], [1, 60]).unwrap_err();
    assert!(
        error.to_string().contains("inf at row-major position 10"),
        "{error}"
    );
    assert!(outlier_columns(&values, [2, 100], 6.0).is_err());
}

#[test]
fn shapes_and_sizes_that_do_not_fit_are_refused() {
    let values = wave(10);
    let quantise = |shape: &[usize], block| {
        let made = FourBitTensor::quantise(&values, shape, options(FourBit::Nf4, block, false));
        made.unwrap_err().to_string()
    };
    assert!(quantise(&[10], 48).contains("blocks of 48"));
    assert!(quantise(&[3, 4], 64).contains("[3, 4] needs 12, but 10"));
    assert!(quantise(&[usize::MAX, 2], 64).contains("more values"));
    assert!(Int8Rows::quantise(&values, [2, 4]).is_err());
    assert!(outlier_columns(&values, [2, 5], 0.0).is_err());
    assert!(outlier_columns(&values, [2, 5], f32::NAN).is_err());
    let empty = FourBitTensor::quantise(&[], &[0, 4], options(FourBit::Fp4, 32, true)).unwrap();
    assert!(empty.is_empty() && empty.dequantise(FloatKind::F32).is_empty());
    assert!(
        Int8Rows::quantise(&[], [3, 0])
            .unwrap()
            .dequantise(FloatKind::F32)
            .is_empty()
    );
}

#[test]
fn a_checkpoint_with_missing_parts_is_refused() {
    let w = FourBitTensor::quantise(&wave(100), &[100], options(FourBit::Nf4, 32, true)).unwrap();
    let parts =
        |codes: &[u8], absmax| FourBitTensor::from_parts(&w.state(), codes.to_vec(), absmax);
    let message = |made: Result<FourBitTensor, QuantError>| made.unwrap_err().to_string();
    assert!(message(parts(w.codes(), None)).contains("no `absmax`"));
    let plain = Absmax::Plain(vec![1.0; 4]);
    assert!(message(parts(w.codes(), Some(plain))).contains("no `nested_absmax`"));
    let absmax = Some(w.absmax().clone());
    assert!(message(parts(&w.codes()[1..], absmax.clone())).contains("needs 50, but 49"));
    assert!(parts(w.codes(), absmax).is_ok());
    assert!(
        Int8Rows::from_parts([1, 2], vec![1, 2], None)
            .unwrap_err()
            .to_string()
            .contains("SCB")
    );
    assert!(DynamicBlocks::from_parts(vec![0; 300], vec![1.0], vec![0.0; 256], 256).is_err());
    assert!(DynamicBlocks::from_parts(vec![0; 2], vec![1.0], vec![0.0; 16], 256).is_err());
}

#[test]
fn a_broken_quant_state_is_refused_with_what_is_wrong() {
    let good = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 3], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1e-05}"#;
    let state = QuantState::parse(good.as_bytes()).unwrap();
    assert_eq!(state.nested.unwrap().offset, 1e-5);
    assert_eq!(state.key(), "quant_state.bitsandbytes__nf4");
    let cases = [
        ("\"nf4\"", "\"int4\"", "int4"),
        ("\"blocksize\": 64", "\"blocksize\": 63", "blocks of 63"),
        ("\"blocksize\": 64", "\"size\": 64", "no `blocksize`"),
        ("float16", "float64", "float64"),
        ("[2, 3]", "[2, -3]", "`shape` must be"),
        ("[2, 3]", "null", "`shape` must be"),
        (", \"nested_offset\": 1e-05", "", "no `nested_offset`"),
        ("1e-05", "1e99", "`nested_offset` must be"),
        ("256", "0", "`nested_blocksize` must be"),
        ("}", "", "cannot be read"),
    ];
    for (from, to, want) in cases {
        assert!(good.contains(from));
        let error = QuantState::parse(good.replacen(from, to, 1).as_bytes()).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
    assert!(QuantState::parse(b"[]").is_err());
    assert!(QuantState::parse(&[0xff, 0]).is_err());
}
