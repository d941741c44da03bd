//! What is made of the two lists of methods: an enum of the adapters and one of the configurations.

/// Makes one enum of the methods and passes every call on.
macro_rules! methods {
    ($($variant:ident($adapter:ty)),+ $(,)?) => {
        /// The adapter beside a linear layer.
        #[derive(Module, Debug)]
        // As large as its largest method; there is one a layer.
        #[allow(clippy::large_enum_variant)]
        pub enum Adapter {
            $(
                #[doc = concat!("[`", stringify!($adapter), "`]")]
                $variant($adapter),
            )+
        }

        impl Adapter {
            /// The layer with the adapter; see [`Method::forward`].
            pub fn forward(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
                match self { $(Self::$variant(m) => m.forward(x, base),)+ }
            }

            /// What it adds to the layer's output; see [`Method::contribution`].
            pub fn contribution(&self, x: Tensor<2>, base: &Base) -> Tensor<2> {
                match self { $(Self::$variant(m) => m.contribution(x, base),)+ }
            }

            /// Weight and bias with the adapter folded in; see [`Method::merged`].
            pub fn merged(&self, base: Base) -> Base {
                match self { $(Self::$variant(m) => m.merged(base),)+ }
            }

            /// Whether its part is the same whatever others do; see [`Method::is_additive`].
            pub fn is_additive(&self) -> bool {
                match self { $(Self::$variant(m) => m.is_additive(),)+ }
            }

            /// Its factors, where there is nothing else to it; see [`Method::low_rank`].
            pub fn low_rank(&self) -> Option<LowRank> {
                match self { $(Self::$variant(m) => m.low_rank(),)+ }
            }

            /// The factor in front of the adapter's product.
            pub fn scale(&self) -> f64 {
                match self { $(Self::$variant(m) => m.scale(),)+ }
            }

            /// Whether it drops anything at random now.
            pub fn has_dropout(&self) -> bool {
                match self { $(Self::$variant(m) => m.has_dropout(),)+ }
            }

            /// Its parameters; see [`Method::for_each_param`].
            pub fn for_each_param(&self, f: &mut dyn FnMut(&'static str, ParamRef<'_>)) {
                match self { $(Self::$variant(m) => m.for_each_param(f),)+ }
            }

            /// Its parameters, to change; see [`Method::for_each_param_mut`].
            pub fn for_each_param_mut(&mut self, f: &mut dyn FnMut(&'static str, ParamMut<'_>)) {
                match self { $(Self::$variant(m) => m.for_each_param_mut(f),)+ }
            }

            /// Frozen tensors that all layers share; see [`Method::shared`].
            pub fn shared(&self) -> Vec<(&'static str, Tensor<2>)> {
                match self { $(Self::$variant(m) => m.shared(),)+ }
            }

            /// What its parameters started from; see [`Method::initial_factors`].
            pub fn initial_factors(&self) -> Option<Vec<Tensor<2>>> {
                match self { $(Self::$variant(m) => m.initial_factors(),)+ }
            }
        }
    };
}

/// Makes one enum of the configurations and passes every call on.
macro_rules! configs {
    // `$dollar` is a `$`, for the macro that this one writes.
    ($dollar:tt $($variant:ident($config:ty) $($without:ident)?),+ $(,)?) => {
        /// The configuration of any method.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(clippy::large_enum_variant)]
        pub enum AdapterConfig {
            $(
                #[doc = concat!("[`", stringify!($config), "`]")]
                $variant($config),
            )+
        }


        $(impl From<$config> for AdapterConfig {
            fn from(config: $config) -> Self {
                Self::$variant(config)
            }
        })+

        impl AdapterConfig {
            /// Every `peft_type` that is read.
            pub const PEFT_TYPES: &'static [&'static str] = &[$(<$config>::PEFT_TYPE,)+];

            /// What the parameters of all methods are called after the module's name; see
            /// [`MethodFacts::KEYS`].
            pub fn all_keys() -> impl Iterator<Item = &'static str> {
                let all: [&[&str]; _] = [$(<$config as MethodFacts>::KEYS,)+];
                all.into_iter().flatten().copied()
            }

            /// Whole keys of what all modules share, of all methods; see [`MethodFacts::SHARED_KEYS`].
            pub fn all_shared_keys() -> impl Iterator<Item = &'static str> {
                let all: [&[&str]; _] = [$(<$config as MethodFacts>::SHARED_KEYS,)+];
                all.into_iter().flatten().copied()
            }

            /// Names with an end that PEFT's files leave out, of all methods; see [`MethodFacts::LONGER_KEYS`].
            pub fn all_longer_keys() -> impl Iterator<Item = &'static str> {
                let all: [&[&str]; _] = [$(<$config as MethodFacts>::LONGER_KEYS,)+];
                all.into_iter().flatten().copied()
            }

            /// `peft_type` in the file.
            pub fn peft_type(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$config>::PEFT_TYPE,)+ }
            }

            /// Reads `adapter_config.json` of any method; `origin` names the file in errors.
            ///
            /// # Errors
            /// A type that is not one of [`Self::PEFT_TYPES`]; all wrong values and all that is not
            /// supported, at once.
            pub fn from_json(value: &Value, origin: &str) -> Result<Self> {
                let object = object_of(value, origin, None)?;
                let kind = object.get("peft_type").and_then(Value::as_str).unwrap_or_default();
                $(if kind == <$config>::PEFT_TYPE {
                    return <$config>::from_json(value, origin).map(Self::$variant);
                })+
                Err(AdapterError::Config {
                    origin: origin.to_string(),
                    problems: vec![format!(
                        "peft_type is {}; supported are {}",
                        object.get("peft_type").unwrap_or(&Value::Null),
                        Self::PEFT_TYPES.join(", ")
                    )],
                })
            }

            /// The file's contents, keys sorted.
            pub fn to_json(&self) -> Value {
                match self { $(Self::$variant(c) => c.to_json(),)+ }
            }

            /// The same with their values; see [`crate::LoraConfig::unknown_settings`].
            pub fn unknown_settings(&self) -> Vec<String> {
                match self { $(Self::$variant(c) => c.unknown_settings(),)+ }
            }

            /// Keys that nobody knows; see [`crate::LoraConfig::unknown_keys`].
            pub fn unknown_keys(&self) -> Vec<&str> {
                match self { $(Self::$variant(c) => c.unknown_keys(),)+ }
            }

            /// The base model's name or directory.
            pub fn base_model_name_or_path(&self) -> Option<&str> {
                match self { $(Self::$variant(c) => c.base_model_name_or_path.as_deref(),)+ }
            }

            /// The base model's revision.
            pub fn revision(&self) -> Option<&str> {
                match self { $(Self::$variant(c) => c.revision.as_deref(),)+ }
            }

            /// What the model is for.
            pub fn task_type(&self) -> Option<&str> {
                match self { $(Self::$variant(c) => c.task_type.as_deref(),)+ }
            }

            /// Sets what the file says of its base; `None` leaves a field alone.
            pub fn set_origin(
                &mut self,
                base: Option<&str>,
                revision: Option<&str>,
                task_type: Option<&str>,
            ) {
                match self { $(Self::$variant(c) => {
                    if let Some(base) = base { c.base_model_name_or_path = Some(base.into()); }
                    if let Some(revision) = revision { c.revision = Some(revision.into()); }
                    if let Some(task) = task_type { c.task_type = Some(task.into()); }
                    c.other.insert("inference_mode".into(), Value::Bool(true));
                })+ }
            }

            /// Says that layers are stored the other way round (transformers' `Conv1D`), where the file of the method
            /// has a key for it: PEFT merges such layers transposed.
            pub fn set_fan_in_fan_out(&mut self) {
                const KEY: &str = "fan_in_fan_out";
                if self.to_json().get(KEY).is_none() {
                    return;
                }
                match self { $(Self::$variant(c) => {
                    c.other.insert(KEY.into(), Value::Bool(true));
                })+ }
            }

            /// Says what the model is for, and that its head is trained whole and saved along, as PEFT does where the
            /// task brings a head of its own. A method without `modules_to_save` has it trained by other means, or not.
            pub fn set_task(&mut self, task_type: &str, head: &str) {
                match self { $(Self::$variant(c) => {
                    c.task_type = Some(task_type.to_owned());
                    configs!(@head c head $($without)?);
                })+ }
            }

            /// Replaces `target_modules`, where the method has that.
            pub fn set_targets(&mut self, targets: Targets) {
                match self { $(Self::$variant(c) => configs!(@targets c targets $($without)?),)+ }
            }
        }

        /// Does the same to whatever configuration it is.
        macro_rules! each_config {
            ($dollar any:expr, $dollar config:ident => $dollar body:expr) => {
                match $dollar any { $(AdapterConfig::$variant($dollar config) => $dollar body,)+ }
            };
        }
    };
    (@head $config:ident $head:ident) => {{
        let saved = $config.modules_to_save.get_or_insert_default();
        if !saved.iter().any(|name| name == $head) {
            saved.push($head.to_owned());
        }
    }};
    (@head $config:ident $head:ident $without:ident) => {{
        let _ = $head;
    }};
    (@targets $config:ident $targets:ident) => { $config.target_modules = Some($targets) };
    (@targets $config:ident $targets:ident whole) => { $config.target_modules = Some($targets) };
    (@targets $config:ident $targets:ident untargeted) => {{
        let _ = ($config, $targets);
    }};
}
