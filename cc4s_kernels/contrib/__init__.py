"""Other frameworks: `torchvision`, `smp` (segmentation_models_pytorch), `transformers`, `mmseg` (mmsegmentation) and
`cupy`.

Each module can be imported without its framework; what needs it raises an `ImportError` that names the package.
Examples stand in examples/, a page in docs/integrations.md.
"""
