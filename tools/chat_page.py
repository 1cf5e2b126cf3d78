"""A chat page in the browser for a trained run: `python -m tools.chat_page` (installed: `nvlm-chat-page`)."""

from megatron_nvlm.commands.chat_page import main

if __name__ == "__main__":
    main()
