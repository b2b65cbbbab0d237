"""How the page looks, on a desk and on a phone."""

# Installed fonts only: nothing is fetched from elsewhere.
FONT = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "PingFang SC", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Consolas", "Noto Sans Mono CJK SC", "monospace"]

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important }
.gradio-container { padding: 0 12px !important }
footer { display: none !important }
#head { align-items: center; flex-wrap: nowrap; margin: 4px 0 }
#head h1 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere }
#head h1 small { font-weight: 400; opacity: .65; margin-left: .5em }
#language { flex: 0 0 auto; min-width: 0 !important; width: auto }
#language label { padding: 4px 10px; font-size: .85rem }
#language input { display: none }
.chat { height: max(360px, calc(100dvh - 265px)) !important }
.chat img { max-height: 340px; object-fit: contain }
.chat .katex-display { overflow-x: auto; overflow-y: hidden; padding: 6px 0 }
#actions { justify-content: flex-start; gap: 8px; margin-top: -4px }
#actions button { flex: 0 0 auto; min-width: 0 }
#examples .grid-container { grid-auto-rows: auto }
#examples img { object-fit: contain; background: #fff }
@media (max-width: 640px) {
  .gradio-container { padding: 0 4px !important }
  .chat { height: max(300px, calc(100dvh - 235px)) !important }
  .pair .chat { height: max(240px, calc(50dvh - 118px)) !important }
  #head h1 { font-size: 1rem }
  #head h1 small { display: none }
}
"""
