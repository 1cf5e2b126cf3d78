"""Real material for a larger demo: `python -m tools.demo_material` (installed: `nvlm-demo-material`)."""

from megatron_nvlm.demo.material import main

if __name__ == "__main__":
    main()
