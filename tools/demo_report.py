"""Write a run's report.html again: `python -m tools.demo_report` (installed: `nvlm-demo-report`)."""

from megatron_nvlm.demo.report import main

if __name__ == "__main__":
    main()
