"""Draws images of captions with an exported EC-DIT, as a pipeline of diffusers.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)("a red heart").images[0]

Time: t = 1 is noise, 0 is data; the transformer predicts v = noise - data. Settings of sampling are those of the run's
config, in `model_index.json`. A public text encoder or autoencoder is in the folder, or has to be passed.

Axes: B images, c h w a latent's channels, height and width, L text tokens, t text width, p width of the pooled caption.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

PAD = 0  # T5's


class EcDitPipeline(DiffusionPipeline):
    """Encodes prompts, integrates the guided velocity from noise, and decodes."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ["text_encoder", "text_encoder_2", "vae"]  # noqa: RUF012

    def __init__(
        self,
        transformer,
        tokenizer,
        scheduler,
        text_encoder=None,
        text_encoder_2=None,
        vae=None,
        autoencoder="identity",
        clip_states="last",
        clip_projection=False,
        towers=None,
        solver="euler",
        num_steps=50,
        churn=0.0,
        guidance_scale=7.5,
        guidance_mode="plain",
        guidance_low=0.0,
        guidance_high=1.0,
        original_size=256,
    ):
        super().__init__()
        parts = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "vae": vae}
        towers = towers or {}
        for name, tower in towers.items():
            if parts[name] is None:
                raise ValueError(
                    f"this folder has no {name}: pass {name}={tower['class']}.from_pretrained(...) with the weights of "
                    f"{tower['name']}, whose fingerprint is {tower['fingerprint']}"
                )
        for encoder in (text_encoder, text_encoder_2):
            if encoder is None or getattr(encoder, "is_quantized", False) or encoder.dtype == transformer.dtype:
                continue
            encoder.to(transformer.dtype)  # transformers takes the dtype of the files, which is often float16
        self.register_modules(transformer=transformer, tokenizer=tokenizer, scheduler=scheduler, **parts)
        self.register_to_config(
            autoencoder=autoencoder,
            clip_states=clip_states,
            clip_projection=clip_projection,
            towers=towers,
            solver=solver,
            num_steps=num_steps,
            churn=churn,
            guidance_scale=guidance_scale,
            guidance_mode=guidance_mode,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            original_size=original_size,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        num_inference_steps=None,
        guidance_scale=None,
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Draws images.

        Args:
          prompt: a caption, or a list of them.
          num_inference_steps: steps of the solver; None for the run's, as `guidance_scale`.
          guidance_scale: 1 is the conditional model, above 1 guides.
          num_images_per_prompt: images of each prompt, in a row.
          generator: of the noise.
          latents: the noise itself, [B, c, h, w].
          output_type: pil, np (float32 [B, H, W, 3] in 0..1), or latent ([B, c, h, w]).
          return_dict: False for a tuple.
        """
        config, device = self.config, self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [one for one in prompts for _ in range(num_images_per_prompt)]
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        sizes = self.transformer.config
        shape = (len(prompts), sizes.latent_channels, sizes.latent_size, sizes.latent_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}: must be {shape}")
        text, guided = self.encode(prompts), scale != 1
        if guided:  # an image's passes with its caption and with the empty one are neighbours
            null = self.encode([""])
            text = [torch.stack([c, u.expand_as(c)], 1).flatten(0, 1) for c, u in zip(text, null, strict=True)]
        size_crop = torch.tensor([[config.original_size, config.original_size, 0.0, 0.0]], device=device)

        def velocity(x, time):
            twice = x.repeat_interleave(2, 0) if guided else x
            times = torch.full((len(twice),), float(time), device=device)
            v = self.transformer(twice, times, *text, size_crop.expand(len(twice), -1))
            return self.guide(v[0::2], v[1::2], scale, float(time)) if guided else v

        x = self.solve(velocity, latents.to(device, torch.float32), num_inference_steps or config.num_steps, generator)
        images = x if output_type == "latent" else self.decode(x)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode(self, prompts):
        """Returns the captions' states [B, L, t], their mask [B, L] and the pooled captions [B, p]."""
        encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
        parts = self.tokenizer(prompts).to(self._execution_device).chunk(len(encoders), 1)
        encoded = [self.encode_by(encoder, ids) for encoder, ids in zip(encoders, parts, strict=True)]
        width = max(states.shape[-1] for states, _, _ in encoded)
        states = torch.cat([F.pad(states, (0, width - states.shape[-1])) for states, _, _ in encoded], 1)
        return (
            states,
            torch.cat([mask for _, mask, _ in encoded], 1),
            torch.cat([pooled for _, _, pooled in encoded], 1),
        )

    def encode_by(self, encoder, ids):
        """Returns states, mask and pooled captions by one text encoder."""
        kind = getattr(encoder.config, "model_type", "")
        if not kind:  # the text tower of this folder
            return encoder(ids)
        if kind == "t5":  # which has no pooled state: the mean takes its place
            mask = ids != PAD
            states = encoder(ids, attention_mask=mask).last_hidden_state
            pooled = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return states, mask, pooled.to(states.dtype)
        found = encoder(ids, output_hidden_states=True)
        end = ids.argmax(1, keepdim=True)  # the largest id ends a caption
        pooled = found.last_hidden_state.take_along_dim(end[..., None], 1)[:, 0]
        if self.config.clip_projection:
            pooled = encoder.text_projection(pooled)
        states = found.last_hidden_state if self.config.clip_states == "last" else found.hidden_states[-2]
        return states, torch.arange(ids.shape[1], device=ids.device) <= end, pooled

    def guide(self, conditional, unconditional, scale, time):
        """Returns u + s (c - u), with the norm of c if guidance is renormalised; outside the interval of times c."""
        config = self.config
        low, now, high = torch.tensor([config.guidance_low, time, config.guidance_high], dtype=torch.float32)
        if not low <= now <= high:  # in float32, as in training and sampling with JAX
            return conditional
        v = unconditional + scale * (conditional - unconditional)
        if config.guidance_mode == "renormalized":
            norms = [y.flatten(1).norm(dim=1)[:, None, None, None] for y in (conditional, v)]
            v = v * norms[0] / torch.where(norms[1] > 0, norms[1], 1)
        return v

    def solve(self, velocity, x, num_steps, generator=None):
        """Integrates dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0; see docs/sampling.md of ecdit."""
        uniform = [1 - step / num_steps for step in range(num_steps)]
        self.scheduler.set_timesteps(sigmas=uniform, device=x.device)  # shifts them
        times, solver, before = self.scheduler.sigmas.tolist(), self.config.solver, None
        gamma = min(self.config.churn / num_steps, math.sqrt(2) - 1)
        for step in self.progress_bar(range(num_steps)):
            time, later = times[step], times[step + 1]
            if solver == "stochastic_heun" and gamma > 0 and time < 1:  # more noise, as of a later time
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = (x + time * math.sqrt(gamma * (2 + gamma)) * noise) / (1 + gamma * time)
                time = (1 + gamma) * time / (1 + gamma * time)
            v = velocity(x, time)
            if solver == "euler":
                x = self.scheduler.step(v, self.scheduler.timesteps[step], x, return_dict=False)[0]
            elif solver == "multistep":  # Adams and Bashforth's formula
                ratio = 0.0 if before is None else (later - time) / (time - times[step - 1]) / 2
                x, before = x + (later - time) * (v if before is None else v + ratio * (v - before)), v
            else:
                x = x + (later - time) * (v + velocity(x + (later - time) * v, later)) / 2
        return x

    def decode(self, latents):
        """Returns images of latents, float32 [B, H, W, 3] in 0..1."""
        if self.config.autoencoder == "latents":
            raise ValueError('the run had latents alone, and no autoencoder: only output_type="latent" can be drawn')
        images = latents
        if self.vae is not None:
            if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
                self.vae.float()  # SDXL's activations exceed float16: images would be black
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            z = latents / self.vae.config.scaling_factor + shift
            images = self.vae.decode(z.to(self.vae.dtype)).sample.float()
        return ((images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
